"""Broken defenses: each makes naive attacks fail without making the model robust.

All wrap a trained network and keep its clean accuracy, so an audit that is worth believing finds
about the robust accuracy of the bare network, and says what stood in the way. One makes the network
a little more robust in truth; it is held against what an attacker finds who knows it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustann.attacks.bpda import bpda


class Wrapped(nn.Module):
    """A network with something in front of it, behind it, or in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Quantised(Wrapped):
    """Rounds to nine grey levels: the gradient is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((8 * x).round() / 8)


class QuantisedStraightThrough(Wrapped):
    """Rounds, and claims in the backward pass that it had not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + ((8 * x).round() / 8 - x).detach())


class ThermometerCode(nn.Module):
    """How many of evenly spread thresholds each pixel passes, as a share."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(1, self.levels + 1, device=x.device) / (self.levels + 1)
        return (x > steps.view(-1, 1, 1, 1, 1)).to(x.dtype).mean(0)


class Thermometer(Wrapped):
    """Counts the thresholds that a pixel passes (Buckman et al., ICLR 2018)."""

    levels = 15

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.code: nn.Module = ThermometerCode(self.levels)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.code(x))


class FineThermometer(Thermometer):
    """So many thresholds that the code hardly differs from the image."""

    levels = 127


class KnownThermometer(Thermometer):
    """What it is to an attacker who knows it: its gradient is the identity's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.code = bpda(self.code)


class Saturated(Wrapped):
    """Logits so large that softmax is 0 or 1 in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 * self.inner(x)


class Noisy(Wrapped):
    """Adds fresh noise at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.1 * torch.randn_like(x))


class Detached(Wrapped):
    """Cuts the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.detach())


class ThroughNumpy(Wrapped):
    """Leaves torch on the way, as JPEG and other codecs do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.from_numpy(x.cpu().numpy().clip(0, 1)).to(x))


class Shattered(Wrapped):
    """Adds a ripple too small to see and a hundred times as steep as the image."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + 0.005 * torch.sin(2e4 * x))


class SoftmaxInside(Wrapped):
    """Returns probabilities."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).softmax(1)


class ArgmaxHead(Wrapped):
    """Returns the predicted class alone, one-hot."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


class InOnePiece(nn.Module):
    """A defense that has no part which could be attacked in its place: its network is no submodule
    of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.hidden = [inner]

    def inner(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class Closed(InOnePiece):
    """Returns the predicted class alone, by a way that no gradient can be thought into."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        classes = logits.argmax(1).cpu().numpy()
        return torch.from_numpy(np.eye(logits.shape[1], dtype=np.float32)[classes]).to(x.device)


class OneHotInOnePiece(InOnePiece):
    """Returns the predicted class alone, one-hot."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return F.one_hot(logits.argmax(1), logits.shape[1]).to(x.dtype)


class CodecInOnePiece(InOnePiece):
    """Encodes each image in NumPy, coarsely, and decodes it."""

    def forward(self, x: Tensor) -> Tensor:
        decoded = [torch.from_numpy(np.round(16 * one.detach().cpu().numpy()) / 16) for one in x]
        return self.inner(torch.stack(decoded).to(x))


class RoundedProbabilities(InOnePiece):
    """Returns probabilities in whole percents."""

    def forward(self, x: Tensor) -> Tensor:
        return (100 * self.inner(x).softmax(1)).round() / 100


class SharpProbabilities(InOnePiece):
    """Returns probabilities that float32 rounds to 0 and 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(50 * self.inner(x), dim=1)


class TopAlone(Wrapped):
    """Returns the largest logit, and nothing of the others."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.where(logits >= logits.amax(1, keepdim=True), logits, torch.zeros_like(logits))


class TopAloneInOnePiece(InOnePiece):
    """The same, with no part to be attacked in its place."""

    forward = TopAlone.forward


class NoisyCodecInOnePiece(InOnePiece):
    """Adds fresh noise, and encodes the image coarsely: random, and without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + 0.1 * torch.randn_like(x)
        return self.inner((8 * noisy).round() / 8)


class HashedTransform(Wrapped):
    """Changes every image by noise that hangs on its own bytes: repeatable, and new at each step
    of an attack."""

    def forward(self, x: Tensor) -> Tensor:
        noise = []
        for image in x.detach():
            seed = zlib.crc32(image.cpu().numpy().tobytes())
            generator = torch.Generator().manual_seed(seed)
            noise.append(torch.randn(image.shape, generator=generator))
        return self.inner(x + 0.1 * torch.stack(noise).to(x))


class BatchStatistics(Wrapped):
    """Centres each image on its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x - 0.5 * (x.mean((0, 2, 3), keepdim=True) - 0.3))


class Purified(Wrapped):
    """Moves the image towards what the network is surest of before it is classified."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            sure = self.inner(leaf).logsumexp(1).sum()
            (slope,) = torch.autograd.grad(sure, leaf)
        return self.inner(x + 0.02 * slope.sign())


class Winners(nn.Module):
    """Keeps the largest tenth of an image's activations (k-winners-take-all: Xiao et al.,
    ICLR 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        count = max(1, round(0.15 * flat.shape[1]))
        least = flat.topk(count, dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, torch.zeros_like(flat)).view_as(x)


def winners_take_all(inner: nn.Module) -> nn.Module:
    """A copy of a network with every ReLU replaced; its weights were trained for ReLUs."""
    model = copy.deepcopy(inner)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Winners())
    return model


@dataclass(frozen=True)
class Exhibit:
    """A broken defense, the check that must fail on it before any attack has run, and the same
    defense with a gradient that leads through it, if the bare network is no measure."""

    make: Callable[[nn.Module], nn.Module]
    check: str
    known: Callable[[nn.Module], nn.Module] | None = None


ZOO: dict[str, Exhibit] = {
    "quantised": Exhibit(Quantised, "gradient-missing"),
    "quantised, straight through": Exhibit(QuantisedStraightThrough, "gradient-mismatch"),
    # On images of 17 grey levels its 15 thresholds leave an attacker two steps up, one down.
    "thermometer": Exhibit(Thermometer, "gradient-missing", KnownThermometer),
    "thermometer, fine": Exhibit(FineThermometer, "gradient-missing"),
    "saturated": Exhibit(Saturated, "saturated-loss"),
    "noisy": Exhibit(Noisy, "randomised"),
    "detached": Exhibit(Detached, "gradient-missing"),
    "through numpy": Exhibit(ThroughNumpy, "gradient-missing"),
    "shattered": Exhibit(Shattered, "gradient-shattered"),
    "softmax inside": Exhibit(SoftmaxInside, "softmax-output"),
    "k winners take all": Exhibit(winners_take_all, "gradient-shattered"),
    "argmax head": Exhibit(ArgmaxHead, "gradient-missing"),
    "closed": Exhibit(Closed, "gradient-missing"),
    "one-hot, in one piece": Exhibit(OneHotInOnePiece, "gradient-missing"),
    "codec, in one piece": Exhibit(CodecInOnePiece, "gradient-missing"),
    "rounded probabilities": Exhibit(RoundedProbabilities, "gradient-missing"),
    "sharp probabilities": Exhibit(SharpProbabilities, "gradient-missing"),
    "top alone": Exhibit(TopAlone, "gradient-missing"),
    "top alone, in one piece": Exhibit(TopAloneInOnePiece, "gradient-missing"),
    "hashed transform": Exhibit(HashedTransform, "gradient-mismatch"),
    "batch statistics": Exhibit(BatchStatistics, "batch-dependent"),
    "purified": Exhibit(Purified, "dynamic-defense"),
}
