"""Models of other toolkits: the same answers and gradients there and here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import robustann as ra
from robustann import interop

LINF = ra.ThreatModel("linf", 0.05)


@pytest.fixture
def images(digits):
    return digits.test.images(slice(0, 16))


def gradient(model, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(model(leaf).square().sum(), leaf)[0]


def test_a_function_is_a_black_box_with_the_same_scores(model, images):
    def scores(x):
        assert isinstance(x, np.ndarray)
        assert x.dtype == np.float32
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()

    box = interop.from_callable(scores, 10)
    leaf = images.clone().requires_grad_()
    torch.testing.assert_close(box(leaf), model(images).detach())
    assert not box(leaf).requires_grad
    torch_box = interop.from_callable(lambda x: model(x), 10, takes="torch")
    torch.testing.assert_close(torch_box(images), model(images).detach())


def test_a_function_cannot_change_the_images(images):
    def vandal(x):
        x[:] = 0
        return np.zeros((len(x), 3))

    before = images.clone()
    interop.from_callable(vandal, 3)(images)
    assert images.equal(before)


def test_a_function_that_returns_something_else_is_told(images):
    with pytest.raises(ra.ModelError, match=r"scores of shape \(16, 3\)"):
        interop.from_callable(lambda x: np.zeros((len(x), 4)), 3)(images)
    with pytest.raises(ra.ModelError, match="from 0 to 2"):
        interop.from_callable(lambda x: np.full(len(x), 3), 3)(images)
    with pytest.raises(ra.ModelError, match="array of scores, got str"):
        interop.from_callable(lambda x: "cat", 3)(images)
    with pytest.raises(ra.UsageError, match="a function"):
        interop.from_callable("net", 3)


@pytest.mark.parametrize("answers", ["scores", "classes"])
def test_a_black_box_is_audited_without_gradients(model, digits, answers):
    asked = []

    def answer(x):
        asked.append(len(x))
        with torch.no_grad():
            logits = model(torch.from_numpy(x)).numpy()
        return logits if answers == "scores" else logits.argmax(1)

    box = interop.from_callable(answer, 10)
    threat = ra.ThreatModel("linf", 0.15)
    result = ra.audit(box, digits, threat, "quick", max_samples=16, explain=False, curve=False)
    own = ra.audit(model, digits, threat, "quick", max_samples=16, explain=False, curve=False)
    assert result.clean_accuracy == own.clean_accuracy
    # Less than with gradients, but far from nothing.
    assert own.robust_accuracy <= result.robust_accuracy < result.clean_accuracy
    labels = [one.label for one in result.attacks]
    assert not [label for label in labels if label.startswith(("pgd", "mm", "apgd", "fgsm"))]
    assert [label for label in labels if label.startswith("rays")]
    assert "gradient-missing" in [one.check for one in result.findings if one.verdict == "fail"]
    assert sum(asked) > 16


def test_predict_proba_there_and_back(digits, images):
    from sklearn.linear_model import LogisticRegression

    x, y = digits.train.images(slice(0, 400)).flatten(1).numpy(), digits.train.labels[:400].numpy()
    estimator = LogisticRegression(max_iter=500).fit(x, y)
    rows = images.flatten(1).numpy()
    box = interop.from_predict_proba(estimator)
    np.testing.assert_allclose(box(images).numpy(), estimator.predict_proba(rows), rtol=1e-5)
    back = interop.to_predict_proba(
        nn.Sequential(nn.Flatten(), linear_of(estimator)), shape=(1, 8, 8), num_classes=10
    )
    np.testing.assert_allclose(
        back.predict_proba(rows), estimator.predict_proba(rows), rtol=1e-3, atol=1e-6
    )
    assert (back.predict(rows) == estimator.predict(rows)).all()
    with pytest.raises(ra.UsageError, match="classes 0 to"):
        interop.from_predict_proba(LogisticRegression().fit(x, y + 1))
    with pytest.raises(ra.UsageError, match="fitted"):
        interop.from_predict_proba(LogisticRegression())


def linear_of(estimator):
    layer = nn.Linear(64, 10)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(estimator.coef_))
        layer.bias.copy_(torch.from_numpy(estimator.intercept_))
    return layer


def test_foolbox_there_and_back(model, images):
    foolbox = pytest.importorskip("foolbox")
    there = interop.to_foolbox(model)
    torch.testing.assert_close(there(images), model(images))
    # A model of images in [0, 255], normalised by foolbox.
    mean, std = 33.0, 64.0
    theirs = foolbox.PyTorchModel(
        model.net.eval(), bounds=(0, 255), preprocessing={"mean": [mean], "std": [std], "axis": -3},
        device="cpu",
    )  # fmt: skip
    here = interop.from_foolbox(theirs)
    torch.testing.assert_close(here(images), model.net((images * 255 - mean) / std))
    assert gradient(here, images).abs().max() > 0
    assert list(here.parameters())


def test_an_attack_of_foolbox_finds_what_it_finds_there(model, digits):
    foolbox = pytest.importorskip("foolbox")
    x, y = digits.test.images(slice(0, 32)), digits.test.labels[:32]
    there = interop.to_foolbox(model)
    _, found, success = foolbox.attacks.FGSM()(there, x, y, epsilons=0.1)
    ours = ra.attack("fgsm", model, x, y, ra.ThreatModel("linf", 0.1))
    assert (model(found).argmax(1) != y).equal(success)
    assert success.sum() == ours.success.sum()


def test_art_there_and_back(model, images):
    pytest.importorskip("art")
    from art.estimators.classification import PyTorchClassifier

    there = interop.to_art(model, shape=(1, 8, 8), num_classes=10)
    np.testing.assert_allclose(there.predict(images.numpy()), model(images).detach(), atol=1e-5)
    theirs = PyTorchClassifier(
        model=model.net, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10,
        clip_values=(0, 16), preprocessing=(4.0, 6.0), device_type="cpu",
    )  # fmt: skip
    here = interop.from_art(theirs)
    np.testing.assert_allclose(
        here(images).detach(), theirs.predict((images * 16).numpy()), atol=1e-4
    )
    assert gradient(here, images).abs().max() > 0


def test_art_with_a_preprocessing_defence_is_a_black_box(model, images):
    pytest.importorskip("art")
    from art.defences.preprocessor import SpatialSmoothing
    from art.estimators.classification import PyTorchClassifier

    theirs = PyTorchClassifier(
        model=model, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10,
        clip_values=(0, 1), device_type="cpu",
        preprocessing_defences=SpatialSmoothing(window_size=3, channels_first=True),
    )  # fmt: skip
    here = interop.from_art(theirs)
    np.testing.assert_allclose(here(images), theirs.predict(images.numpy()), atol=1e-5)
    assert (here(images) - model(images)).abs().max() > 0.1
    assert not here(images.clone().requires_grad_()).requires_grad


def test_what_is_no_model_is_told():
    with pytest.raises(ra.UsageError, match="classifier of ART"):
        interop.from_art(object())
    with pytest.raises(ra.UsageError, match=r"foolbox\.PyTorchModel"):
        interop.from_foolbox(object())


def test_a_pytorch_dataset_is_audited(model, digits):
    dataset = torch.utils.data.TensorDataset(
        digits.test.images(slice(0, 40)), digits.test.labels[:40]
    )
    result = ra.audit(model, dataset, LINF, "quick", explain=False, curve=False, trust=False)
    pair = (digits.test.images(slice(0, 40)), digits.test.labels[:40])
    same = ra.audit(model, pair, LINF, "quick", explain=False, curve=False, trust=False)
    assert result.n == 40
    assert result.robust_accuracy == same.robust_accuracy


def test_a_dataset_whose_classes_are_in_another_order_is_renumbered(model, digits):
    names = [*model.spec.class_names[1:], model.spec.class_names[0]]
    names = [f"digit {name}" for name in names]
    named = model.spec.model_copy(
        update={"class_names": tuple(f"Digit-{i}" for i in model.spec.class_names)}
    )
    model.spec = named

    class Turned(torch.utils.data.Dataset):
        classes = names

        def __len__(self):
            return 24

        def __getitem__(self, index):
            label = int(digits.test.labels[index])
            return digits.test.images([index])[0], (label - 1) % 10

    with pytest.warns(UserWarning, match="another order"):
        turned = ra.audit(model, Turned(), LINF, "quick", explain=False, curve=False, trust=False)
    right = model(digits.test.images(slice(0, 24))).argmax(1) == digits.test.labels[:24]
    assert turned.clean_accuracy == pytest.approx(float(right.float().mean()))
