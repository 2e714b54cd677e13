"""Networks in every format that robustann opens, all trained on the same images of a folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NAMES = ("blue", "green", "red")
# Of the test images of each class, so many lie in the folder of another one.
MISLABELLED, EACH = 2, 8


def colours(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Noisy images (3 * count, 3, 32, 32) uint8 of three colours, and which."""
    random = np.random.default_rng(seed)
    images = random.integers(40, 140, (3 * count, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(3 * count) % 3
    images[np.arange(3 * count), 2 - labels] += 90
    return torch.from_numpy(images), torch.from_numpy(labels)


def image_folder(folder: Path) -> Path:
    """Train and test folders of the images; some of the test images in the wrong one."""
    for part, seed, count in (("train", 0, 12), ("test", 1, EACH)):
        images, labels = colours(seed, count)
        for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            wrong = part == "test" and number // 3 < MISLABELLED
            name = NAMES[(label + 1) % 3 if wrong else label]
            path = folder / part / name / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def normalized(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As a network trained on normalised images gets them."""
    return (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def fit_head(net: nn.Module, head: nn.Linear, x: Tensor, labels: Tensor, call=None) -> None:
    """Solve the last layer of a random network for the labels, by ridge regression."""
    kept: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: kept.append(inputs[0]))
    net.eval()
    with torch.no_grad():
        (call or net)(x)
        hook.remove()
        features = kept[0].double().reshape(len(x), -1)
        middle = features.mean(0)
        centred = features - middle
        targets = nn.functional.one_hot(labels, head.out_features).double() - 1 / 3
        ridge = 1e-3 * centred.square().sum() / len(centred) * torch.eye(len(middle)).double()
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ targets).T
        head.weight.copy_(weight)
        head.bias.copy_(-(weight @ middle))


def resnet() -> nn.Module:
    """torchvision's ResNet-18, random but for its last layer."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None, num_classes=3)
    images, labels = colours(0, 12)
    fit_head(net, net.fc, normalized(images, MEAN, STD), labels)
    return net


def save_resnet(net: nn.Module, folder: Path) -> None:
    """As .pt, .safetensors, TorchScript, .pt2 and ONNX."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), folder / "net.pt")
    save_file(net.state_dict(), folder / "net.safetensors")
    images = torch.zeros(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(net, images).save(str(folder / "net.ts"))
        program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "net.pt2")


def save_onnx(net: nn.Module, path: Path, **options: object) -> None:
    """As ONNX, by PyTorch's own exporter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(2, 3, 32, 32),), str(path), input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}}, dynamo=False, **options
        )  # fmt: skip


def save_timm(folder: Path) -> Path:
    """A folder as timm's ``save_for_hf`` lays it out."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = timm.create_model("resnet10t", pretrained=False, num_classes=3)
    images, labels = colours(0, 12)
    fit_head(net, net.get_classifier(), normalized(images, MEAN, STD), labels)
    folder.mkdir(parents=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "resnet10t",
        "num_classes": 3,
        "label_names": list(NAMES),
        "pretrained_cfg": {"mean": MEAN, "std": STD, "input_size": [3, 32, 32]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def save_transformers(folder: Path) -> Path:
    """A folder as ``save_pretrained`` lays it out, its classes in another order."""
    import transformers

    torch.manual_seed(0)
    order = [2, 0, 1]
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, id2label={i: NAMES[k] for i, k in enumerate(order)},
        label2id={NAMES[k]: i for i, k in enumerate(order)},
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config)
    images, labels = colours(0, 12)
    place = torch.tensor([order.index(k) for k in range(3)])
    x = normalized(images, (0.5,) * 3, (0.5,) * 3)
    fit_head(net, net.classifier, x, place[labels])
    net.save_pretrained(folder)
    told = {
        "do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_resize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder
