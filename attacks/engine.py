"""The one driver of all attacks: it judges, counts, drops what has fallen, and restores the model.

Determinism: the rows of a batch are always a multiple of ``ALIGNMENT``. Matrix kernels treat the
rows left over at the end of a batch with other instructions than full groups of rows, so a
sample's logits could differ in the last bits with its batch, and an iterative attack amplifies
that. With aligned batches the arithmetic of a row does not hang on its neighbours (measured on
CPU for linear, convolutional and residual networks), so neither do results on the batch size.
Known exception: a linear layer of few outputs whose input width is no multiple of four may round by
the place of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustann.attacks.base import Attack, State, at_least
from robustann.attacks.losses import Loss, margin, slope_of
from robustann.attacks.relaxed import leaky_backward
from robustann.errors import DataError, ModelError, UsageError, unknown_name
from robustann.memory import keep_freed
from robustann.rng import SampleRandom, stable_hash
from robustann.threat import Region, ThreatModel, asking_waits, check_images

ALIGNMENT = 8
# Steps from one time to the next at which fallen samples leave, where asking waits for the device.
_SPACING = 8
# Looks in which nothing fell are judged together: so many, if their images need no more bytes.
_TOGETHER, _HELD = 32, 2**24
# What a search may compute in; what it finds is judged in float32.
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of losses in float16.
_SCALE = 2.0**10


@dataclass(frozen=True)
class AttackResult:
    """What an attack did to N images. All tensors lie on the CPU, one row a sample.

    Attributes:
        adversarial: the final images, float32 (N, C, H, W), always within the threat model: the
            first adversarial one where the attack succeeded, else the one of smallest margin. Of a
            minimum-norm attack the nearest adversarial one found, which may lie beyond eps;
            ``prediction`` then differs from the label though ``success`` is false.
        success: whether the final image, judged in float32, is classified wrongly (targeted: as
            the wanted class). True also where the original already was; the image is then the
            original.
        distance: of the final image to the original, in the norm of the threat model, float64.
        margin: of the final image: logit of the label minus the largest other one (targeted: the
            largest other one minus the wanted one's). Negative where successful.
        prediction: the class predicted for the final image.
        forwards: images of this sample that were passed through the model.
        backwards: gradients with respect to this sample that were computed.
        first_success: forwards up to the first adversarial image, -1 where there was none.
        attack: the attack with its hyper-parameters.

    >>> from robustann.attacks.fgsm import FGSM
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))  # each pixel is a logit
    >>> x, labels = torch.tensor([[[[0.75, 0.25]]], [[[1.0, 0.125]]]]), torch.tensor([0, 0])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> found = run(FGSM(), model, x, labels, ThreatModel("linf", 0.375), random=random)
    >>> found.success.tolist(), found.margin.tolist(), found.success_rate
    ([True, False], [-0.25, 0.125], 0.5)
    """

    adversarial: Tensor
    success: Tensor
    distance: Tensor
    margin: Tensor
    prediction: Tensor
    forwards: Tensor
    backwards: Tensor
    first_success: Tensor
    attack: Attack

    @property
    def success_rate(self) -> float:
        """Share of all N images for which ``success`` holds."""
        return float(self.success.float().mean())

    def select(self, rows: Tensor) -> AttackResult:
        """The result of these rows alone (a mask, or positions)."""
        names = [name for name in self.__dataclass_fields__ if name != "attack"]
        return AttackResult(
            **{name: getattr(self, name)[rows] for name in names}, attack=self.attack
        )

    @classmethod
    def concatenate(cls, parts: list[AttackResult]) -> AttackResult:
        """The results of consecutive batches of one attack as one."""
        names = [name for name in cls.__dataclass_fields__ if name != "attack"]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, attack=parts[0].attack)


@contextmanager
def frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode, no parameter gradients, own random numbers; all as before at the end.

    Training flags and ``requires_grad`` are restored one by one, and the global random state of
    the CPU and of the model's device too: a model that draws random numbers draws the same ones
    for the same ``seed``, and the caller's stream does not notice.

    Raises:
        ModelError: the model was made in inference mode: nothing can be derived through it.

    >>> model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4, 2)).train()
    >>> with frozen(model, seed=0):
    ...     model.training, model[2].weight.requires_grad
    (False, False)
    >>> model.training, model[2].weight.requires_grad
    (True, True)
    """
    keep_freed()
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "expected a model that gradients can pass through, got one that was made or loaded "
            "under torch.inference_mode(); make it outside"
        )
    flags = [(module, module.training) for module in model.modules()]
    # A model may count or gather statistics in its buffers, in place or by replacing them.
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {
        tensor.device
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.device.type == "cuda"
    }
    with (
        torch.random.fork_rng(devices=sorted(devices, key=str)),
        # Tensors made under inference mode never take part in autograd.
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        _seed_model(devices, stable_hash("model", seed))
        try:
            model.eval()
            for parameter, _ in grads:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in grads:
                parameter.requires_grad_(flag)
            for module, training in flags:
                module.training = training
            for module, name, buffer, content in buffers:
                # Through .data: the content is again what it was, so a graph that has saved the
                # buffer before may still run backward. Comparing would wait for an accelerator.
                buffer.data.copy_(content)
                module._buffers[name] = buffer


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none.

    >>> model_device(nn.Linear(4, 2))
    device(type='cpu')
    """
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _check_logits(logits: Any, rows: int) -> Tensor:
    tensor = isinstance(logits, Tensor)
    if not tensor or logits.dim() != 2 or len(logits) != rows or logits.shape[1] < 2:
        came = f"shape {tuple(logits.shape)}" if tensor else type(logits)
        raise ModelError(
            f"expected the model to return logits of shape ({rows}, classes) of 2 classes or "
            f"more, got {came}; wrap it so that it maps images to one row of logits each"
        )
    answer: Tensor = logits.float()
    return answer


def predict_logits(
    model: nn.Module,
    x: Tensor,
    *,
    batch_size: int = 256,
    seed: int = 0,
    draws: int = 1,
    finite: bool = True,
) -> Tensor:
    """Float32 logits (N, K) of the images, on the CPU; the model stays as it was.

    Those of a randomised model may be averaged over so many ``draws``. Answers that are not
    ``finite`` are refused, unless the caller sees to them.

    Raises:
        DataError: ``x`` is no batch of float images.
        ModelError: the output is no row of finite logits an image.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> predict_logits(model, torch.rand(5, 1, 2, 2)).shape
    torch.Size([5, 3])
    """
    check_images(x)
    device = model_device(model)
    parts = []

    def answers(images: Tensor) -> Any:
        # A model may change its copy in place: no gradient is asked for here.
        return model(images.clone())

    with frozen(model, seed), torch.no_grad():
        for batch in x.split(batch_size):  # type: ignore[no-untyped-call]
            rows = _aligned_rows(len(batch), device)
            # The same draws for each batch: how many there are must not matter.
            with _own_draws(device, "predict", seed):
                part = _mean_logits(answers, batch.to(device)[rows], draws)[: len(batch)]
            parts.append(part.cpu())
    logits = torch.cat(parts)
    bad = int((~logits.isfinite()).any(1).sum())
    if bad and finite:
        raise ModelError(
            f"expected finite logits, got NaN or infinity for {bad} of {len(x)} images; "
            "check the weights and the normalisation"
        )
    return logits


@contextmanager
def _own_draws(device: torch.device, *names: str | int) -> Iterator[None]:
    """Random numbers of the model that are these names' alone; the global stream goes on after."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        _seed_model(devices, stable_hash(*names))
        yield


def _seed_model(devices: Iterable[torch.device], number: int) -> None:
    # Not torch.manual_seed: it takes no larger numbers, and seeds devices not forked here.
    torch.default_generator.manual_seed(number)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def _mean_logits(model: Callable[[Tensor], Any], x: Tensor, draws: int) -> Tensor:
    """The logits of ``x``, averaged over so many calls of a randomised model."""
    version = x._version
    try:
        logits = _check_logits(model(x), len(x))
        for _ in range(draws - 1):
            logits = logits + _check_logits(model(x), len(x))
    except RuntimeError as error:
        # What torch says where the gradient with respect to ``x`` is asked for.
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise _changed_input() from error
    if x._version != version:
        raise _changed_input()
    return logits / draws if draws > 1 else logits


def _changed_input() -> ModelError:
    return ModelError(
        "expected a model that leaves the images as they are that it is given, got one that "
        "changes them in place; make new ones in its forward pass (x = x - mean, not "
        "x.sub_(mean), and no inplace=True in its first layer)"
    )


def _aligned_rows(count: int, device: torch.device) -> Tensor:
    """0..count-1, filled up with copies of row 0 to a multiple of the alignment."""
    rows = torch.arange(count + -count % ALIGNMENT, device=device)
    return rows.masked_fill_(rows >= count, 0) if count % ALIGNMENT else rows


@dataclass(frozen=True)
class _Look:
    """Images that were shown to the model, and what it said: to be judged.

    Whether any has fallen is asked at once where asking costs nothing; else ``claims`` is None.
    """

    x: Tensor
    version: int
    logits: Tensor
    backwards: int
    claims: bool | None

    def check(self) -> None:
        """Refuse images that are others by now."""
        if self.x._version != self.version:
            raise UsageError(
                "expected an attack to leave the images as they are that it has shown to the "
                "model, got some that were changed in place; make new ones in each step"
            )


def _pixel_sums(looks: Sequence[_Look]) -> Tensor:
    """Of each image: no number where one of its pixels is none."""
    return _joined([look.x.flatten(1).sum(1) for look in looks])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Oracle:
    """What an attack sees: the samples still standing, and answers to its queries.

    Attributes:
        x: the originals, (M, C, H, W).
        labels: the true (targeted: the wanted) classes, (M,).
        region: the allowed images around ``x``.
        random: one random stream a sample, fresh at each start.
        threat: the threat model.
        logits: those of the last query, (M, K), detached.

    Every query is counted and judged; M shrinks between steps as samples fall. Some rows may be
    padding; attacks need not know which. To judge is to wait for the device: a ``patient`` oracle
    puts it off until samples leave, or somebody asks for what hangs on it, with the same outcome.
    A success is confirmed by a forward of its own, at once; a ``provisional`` oracle lets the
    sample go, and confirms all of them together in :meth:`confirm`.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))  # each pixel is a logit
    >>> x, labels = torch.tensor([[[[0.75, 0.25]]]]), torch.tensor([0])
    >>> random = SampleRandom.create(0, torch.arange(1))
    >>> oracle = Oracle(model, x, labels, ThreatModel("linf", 0.375), random)
    >>> oracle.gradient(oracle.x, margin)[0].flatten().tolist()
    [-1.0, 1.0]
    >>> _ = oracle.forward(oracle.region.project(x + torch.tensor([-0.375, 0.375])))
    >>> oracle.fallen[0].item(), oracle.best_margin[0].item()
    (True, -0.25)
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        random: SampleRandom,
        judging: bool = True,
        minimum_norm: bool = False,
        best: tuple[Tensor, Tensor] | None = None,
        limit: Tensor | None = None,
        draws: int = 1,
        precision: str = "float32",
        patient: bool = False,
        judge: nn.Module | None = None,
        provisional: bool = False,
    ) -> None:
        count = len(x)
        rows = _aligned_rows(count, x.device)
        self.threat = threat
        self.x = x[rows]
        self.labels = labels[rows]
        reach = threat.with_eps(threat.widest(x[0].numel())) if minimum_norm else threat
        self.region = reach.region(self.x)
        self.random = self._streams = random.select(rows)
        self.logits = torch.empty(0, device=x.device)
        self._model = model
        # Who confirms what is claimed.
        self._confirming = judge or model
        self._judging = judging
        self._classes = -1
        self._minimum_norm = minimum_norm
        self._draws = draws
        self._low = LOW_PRECISION.get(precision)
        self._scale = _SCALE if self._low is torch.float16 else 1.0
        # Of a minimum-norm attack nothing is confirmed on the way, so nothing waits.
        self._patient = patient and not minimum_norm
        self._provisional = provisional
        self._pending: list[_Look] = []
        # Judged or not: an attack that is refused is refused always.
        self._last: _Look | None = None
        # Whether samples may have fallen since some left.
        self._fell = False
        # Images judged so far, in steps: the same for every batch.
        self._looks = 0
        self._rows = rows
        self._standing = torch.arange(len(rows), device=x.device) < count
        # Best image so far of each row; flushed into ``_kept`` when the row leaves.
        self._best: State = {
            # Never written into: each new best is a tensor of its own.
            "adversarial": self.x if best is None else best[0][rows],
            "margin": torch.full((len(rows),), torch.inf, device=x.device)
            if best is None
            else best[1][rows].float(),
            "distance": torch.full((len(rows),), torch.inf, device=x.device),
            "success": torch.zeros_like(self._standing),
            # What nothing finite improves on is still classified correctly.
            "prediction": torch.full_like(self.labels, -1)
            if threat.targeted
            else self.labels.clone(),
            "forwards": torch.zeros_like(self.labels),
            "backwards": torch.zeros_like(self.labels),
            "first_success": torch.full_like(self.labels, -1),
        }
        self._limit = None if limit is None else limit[rows]
        self._count = count
        # Made when the first row leaves.
        self._kept: State = {}
        self._real = self._standing.clone()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def best(self) -> Tensor:
        """The image of smallest margin that each sample has been shown so far (M, C, H, W); an
        earlier attack's, where one was handed on."""
        self._settle()
        return self._best["adversarial"]

    @property
    def best_margin(self) -> Tensor:
        """The margin of :attr:`best` (M,): positive while the sample stands, infinite before the
        first query."""
        self._settle()
        return self._best["margin"]

    @property
    def fallen(self) -> Tensor:
        """Whether the images of the last query were adversarial (M,), judged by logits alone."""
        hit = self.logits.argmax(1) == self.labels
        return hit if self.threat.targeted else ~hit

    @property
    def gap(self) -> Tensor:
        """The margin of the images of the last query (M,), by logits alone: positive while the
        sample stands, infinite where the answer is no number."""
        gap = -margin(self.logits, self.labels, self.threat.targeted)
        return gap.masked_fill(~self.logits.isfinite().all(1), torch.inf)

    @property
    def best_distance(self) -> Tensor:
        """To the nearest adversarial image that a minimum-norm attack has shown (M,), float32;
        that image is then :attr:`best`. Infinite where there was none."""
        self._settle()
        return self._best["distance"]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (M, K) of ``x``: one forward a sample (and draw), judged."""
        with torch.no_grad():
            self.logits = self._query(x)
        self._show(x)
        return self.logits

    def gradient(self, x: Tensor, loss: Loss, leak: float = 0.0) -> Tensor:
        """Gradient of the loss with respect to ``x``: one forward and one backward a sample.

        The loss is summed over samples, so no gradient hangs on the batch. Entries that are not
        finite count as zero. ``leak`` lets that share of the gradient through closed ReLUs (see
        :func:`~robustann.attacks.relaxed.leaky_backward`). Over several draws of a randomised
        model, logits and gradients are averaged (EOT: Athalye et al., ICML 2018).

        Raises:
            ModelError: the output does not depend on the input in a differentiable way.
        """
        return self.gradients(x, [loss], leak)[0]

    def gradients(self, x: Tensor, losses: Sequence[Loss], leak: float = 0.0) -> list[Tensor]:
        """The gradients of several losses: one forward a sample, and one backward for each.

        As :meth:`gradient` in everything else.
        """
        x = x.detach().requires_grad_()
        with leaky_backward(leak) if leak else nullcontext():
            logits = self._query(x)
        if not logits.requires_grad:
            raise ModelError(
                "expected a differentiable model, but its output carries no gradient; remove "
                "no_grad, detach or argmax from its forward pass, or use an attack that needs "
                "no gradients"
            )
        found = []
        for place, loss in enumerate(losses, start=1):
            slope = slope_of(loss)
            output, weight = logits, None
            if slope is None:
                output = loss(logits, self.labels, self.threat.targeted).sum()
            else:
                weight = slope(logits.detach(), self.labels, self.threat.targeted)
            if self._scale != 1:
                # Small gradients would be zero in between.
                output = output * self._scale
            (gradient,) = torch.autograd.grad(
                output, x, weight, allow_unused=True, retain_graph=place < len(losses)
            )
            if gradient is None:
                raise ModelError(
                    "expected the logits to depend on the image, but they do not; check the "
                    "model's forward pass"
                )
            # Not in place: autograd may return a broadcast tensor.
            if self._scale != 1:
                gradient = gradient / self._scale
            found.append(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
        self.logits = logits.detach()
        self._show(x.detach(), self._draws * len(losses))
        return found

    def _query(self, x: Tensor) -> Tensor:
        low = self._low
        with torch.autocast(x.device.type, low) if low is not None else nullcontext():
            logits = _mean_logits(self._model, x, self._draws)
        if logits.shape[1] != self._classes:
            # Before a label is used as an index: on a GPU that would end the process's CUDA. Not in
            # each batch of training, for which the trainer has looked through all of them.
            if self._judging or not asking_waits(x.device):
                check_classes(self.labels, logits.shape[1])
            self._classes = logits.shape[1]
        return logits

    @property
    def rows(self) -> Tensor:
        """Which of the images handed to the engine each row is, int64 (M,)."""
        return self._rows

    @property
    def standing(self) -> Tensor:
        """Which rows still stand and are no padding (M,): the others need no work."""
        self._settle()
        return self._standing

    def ask(self, x: Tensor) -> Tensor:
        """Logits of any number of any images, differentiable, neither judged nor counted: for
        foreign attacks, which tell :meth:`count` what they spent."""
        rows = _aligned_rows(len(x), x.device)
        return _mean_logits(self._model, x[rows], self._draws)[: len(x)]

    def count(self, forwards: Tensor, backwards: Tensor) -> None:
        """Charge each row with images and gradients asked for through :meth:`ask`, int64 (M,)."""
        self._settle()
        self._best["forwards"] += self._standing * forwards * self._draws
        self._best["backwards"] += self._standing * backwards * self._draws

    def _show(self, x: Tensor, backwards: int = 0) -> None:
        """What is said of ``x`` is judged: now, or later."""
        if not self._judging:
            return
        if self._last is not None:
            self._last.check()
        claims = None if self._patient or self._minimum_norm else self._claims()
        most = min(_TOGETHER, _HELD // max(x.nbytes, 1))
        # A limit is reached after any look.
        waits = claims is False and self._limit is None and len(self._pending) + 1 < most
        self._last = _Look(x, x._version, self.logits, backwards, claims)
        self._pending.append(self._last)
        if not (waits or self._patient):
            self._settle()

    def _claims(self) -> bool:
        """Whether the last query seems to have brought any sample down that still stood."""
        if not self.threat.targeted and torch.equal(self.logits.argmax(1), self.labels):
            # At less than the question below, where nothing falls.
            return False
        return bool((self.fallen & self._standing).any())

    def _settle(self) -> None:
        """Judge what waits for it, in the order in which it was shown."""
        looks, self._pending = self._pending, []
        if not looks:
            return
        for look in looks:
            look.check()
        claims = [look.claims for look in looks]
        alone = self._minimum_norm or self._limit is not None
        # Where nothing fell, a look at the best images is enough, if it costs nothing.
        costly = self._patient or asking_waits(self.x.device)
        quiet = not (alone or costly or any(claims))
        logits = _joined([look.logits for look in looks])
        sums = logits[:, 0] if quiet else _pixel_sums(looks)
        outcome = self._outcome(sums, logits, _joined([self.labels] * len(looks)))
        shape = (len(looks), len(self))
        prediction, fallen, gap = (value.view(shape) for value in outcome)
        if self._patient:
            # One question for all of them.
            claims = (fallen & self._standing).any(1).tolist()
        done = 0
        for place, look in enumerate(looks):
            if claims[place] or alone:
                self._stood(looks[done:place], prediction[done:place], gap[done:place])
                claim = bool(claims[place])
                self._judge(look, prediction[place], fallen[place], gap[place], claim)
                done = place + 1
        self._stood(looks[done:], prediction[done:], gap[done:], quiet)

    def _stood(
        self, looks: Sequence[_Look], prediction: Tensor, gap: Tensor, unseen: bool = False
    ) -> None:
        """Judge looks in which nothing fell, (L, M), at once: only the margins count.

        Where the images are ``unseen``, they may be no numbers.
        """
        if not looks:
            return
        best, standing = self._best, self._standing
        # The first of them where several are smallest, as one after the other.
        lowest, place = gap.min(0)
        better = standing & (lowest < best["margin"])
        images = best["adversarial"]
        if asking_waits(images.device):
            shape = (-1,) + (1,) * (images.dim() - 1)
            for number, look in enumerate(looks):
                chosen = better & (place == number)
                images = torch.where(chosen.view(shape), look.x, images)
        elif bool(better.any()):
            images = images.clone()
            for number, look in enumerate(looks):
                rows = (better & (place == number)).nonzero().squeeze(1)
                if len(rows):
                    images[rows] = look.x[rows]
            if unseen and not bool(images.sum().isfinite()):
                fit = _pixel_sums(looks).isfinite().view(gap.shape)
                self._stood(looks, prediction, gap.masked_fill(~fit, torch.inf))
                return
        best["adversarial"] = images
        best["margin"] = torch.where(better, lowest, best["margin"])
        predicted = prediction.gather(0, place[None]).squeeze(0)
        best["prediction"] = torch.where(better, predicted, best["prediction"])
        best["forwards"] += standing * (self._draws * len(looks))
        best["backwards"] += standing * sum(look.backwards for look in looks)
        self._looks += len(looks)

    def _judge(
        self, look: _Look, prediction: Tensor, fallen: Tensor, gap: Tensor, claim: bool
    ) -> None:
        self._looks += 1
        self._fell = True
        best, standing, x = self._best, self._standing, look.x
        if look.backwards:
            best["backwards"] += standing * look.backwards
        best["forwards"] += standing * self._draws
        if self._minimum_norm:
            distance = self.threat.distance(x, self.x).to(best["distance"].dtype)
            nearer = fallen & (distance < best["distance"])
            better = standing & (nearer | (~fallen & ~best["success"] & (gap < best["margin"])))
            best["distance"] = torch.where(standing & nearer, distance, best["distance"])
        else:
            asked = best["forwards"]
            if claim:
                claimed = standing & fallen
                if not self._provisional:
                    x, prediction, fallen, gap = self._confirmed(
                        x, prediction, fallen, gap, claimed
                    )
                best["forwards"] = best["forwards"] + claimed * self._draws
            better = standing & (fallen | (gap < best["margin"]))
        new = standing & fallen & ~best["success"]
        shape = (-1,) + (1,) * (x.dim() - 1)
        best["adversarial"] = torch.where(better.view(shape), x, best["adversarial"])
        best["margin"] = torch.where(better, gap, best["margin"])
        best["prediction"] = torch.where(better, prediction, best["prediction"])
        best["success"] = best["success"] | new
        reached = best["forwards"] if self._minimum_norm else asked
        best["first_success"] = torch.where(new, reached, best["first_success"])
        # Nothing is nearer than the original itself.
        over = best["distance"] == 0 if self._minimum_norm else fallen
        self._standing = standing & ~over
        if self._limit is not None:
            self._standing = self._standing & (best["forwards"] + best["backwards"] < self._limit)

    def _outcome(
        self, sums: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction, whether the sample has fallen, and its margin, for each row.

        What is not finite, logits or image (by the sum of its pixels), proves nothing: argmax of
        NaN is an index like any other.
        """
        prediction = logits.argmax(1)
        hit = prediction == labels
        finite = sums.isfinite() & logits.isfinite().all(1)
        # A tie in the logits can be won or lost: what counts is the prediction.
        fallen = finite & (hit if self.threat.targeted else ~hit)
        gap = -margin(logits, labels, self.threat.targeted)
        return prediction, fallen, gap.masked_fill(~finite, torch.inf)

    def _confirmed(
        self, x: Tensor, prediction: Tensor, fallen: Tensor, gap: Tensor, claimed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Judge claimed successes by a forward of their own, on the image projected once more.

        What does not hold (a lucky draw of a randomised model, an image outside the region) is
        no success, and its sample goes on being attacked.
        """
        found = claimed.nonzero().squeeze(1)
        if not len(found):
            # Who claims it has fallen in an earlier look.
            return x, prediction, fallen, gap
        again = self._look_again(
            x[found], self.region.select(found), self.labels[found], self.random.seed, self._looks
        )
        x, prediction, fallen, gap = x.clone(), prediction.clone(), fallen.clone(), gap.clone()
        x[found], prediction[found], fallen[found], gap[found] = again
        return x, prediction, fallen, gap

    def _look_again(
        self, x: Tensor, region: Region, labels: Tensor, *names: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The images projected once more, and the outcome of a forward of their own."""
        rows = _aligned_rows(len(x), x.device)
        images = region.select(rows).project(x[rows])
        # Whether anything is confirmed hangs on the batch; what a randomised model draws next must
        # not.
        with torch.no_grad(), _own_draws(images.device, "confirm", *names):
            logits = _mean_logits(self._confirming, images, self._draws)
        # Of what fills up the batch nothing is taken: a model that draws answers it otherwise.
        images, logits = images[: len(x)], logits[: len(x)]
        return images, *self._outcome(images.flatten(1).sum(1), logits, labels)

    def restart(self, start: int) -> None:
        """Fresh random streams for the samples that still stand."""
        self._settle()
        self.random = self._streams.fork("start", start)

    def compact(self, state: State) -> State:
        """Drop the samples that have fallen, down to an aligned number of rows."""
        if self._pending and not (self._patient or self._fell):
            # Nothing fell in any of them, nor before.
            return state
        self._settle()
        self._fell = False
        standing = int(self._standing.sum())
        size = standing + (-standing % ALIGNMENT)
        if size == len(self):
            return state
        # Some fallen rows stay on as padding.
        order = torch.argsort(self._standing.logical_not().to(torch.uint8), stable=True)
        keep, leave = order[:size].sort().values, order[size:]
        self._flush(leave)
        self.region, self.random = self.region.select(keep), self.random.select(keep)
        self.x, self.labels = self.region.x, self.labels[keep]
        self._streams = self._streams.select(keep)
        if len(self.logits):
            self.logits = self.logits[keep]
        if self._limit is not None:
            self._limit = self._limit[keep]
        self._rows, self._real = self._rows[keep], self._real[keep]
        self._standing = self._standing[keep]
        self._best = {name: value[keep] for name, value in self._best.items()}
        return {name: value[keep] for name, value in state.items()}

    def only(self, samples: Tensor) -> None:
        """Let all other samples go (a mask of those that came, (N,))."""
        self._standing = self._standing & samples[self._rows]
        self.compact({})

    def _flush(self, positions: Tensor) -> None:
        positions = positions[self._real[positions]]
        rows = self._rows[positions]
        for name, value in self._best.items():
            if name not in self._kept:
                self._kept[name] = value.new_empty((self._count, *value.shape[1:]))
            self._kept[name][rows] = value[positions]

    def finish(self) -> State:
        """Everything kept of every sample, in the original order."""
        self._settle()
        if not self._kept:
            # All are there, in their order.
            if len(self) == self._count:
                return self._best
            return {name: value[: self._count].clone() for name, value in self._best.items()}
        self._flush(torch.arange(len(self), device=self._rows.device))
        return self._kept

    def confirm(self, kept: State, x: Tensor, labels: Tensor) -> Tensor:
        """Confirm, in what :meth:`finish` gave for these originals, each success of a provisional
        oracle, whose forward is counted already; which samples' success does not hold (N,)."""
        claims = kept["success"].nonzero().squeeze(1)
        refuted = torch.zeros_like(kept["success"])
        if not len(claims):
            return refuted
        # Made anew: until now it would have been held for the sake of those that had left.
        region = self.threat.region(x[claims])
        images, prediction, holds, gap = self._look_again(
            kept["adversarial"][claims], region, labels[claims], self._streams.seed
        )
        kept["adversarial"][claims], kept["prediction"][claims] = images, prediction
        kept["margin"][claims], refuted[claims] = gap, ~holds
        return refuted


def run(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    random: SampleRandom,
    known_correct: bool = False,
    best: tuple[Tensor, Tensor] | None = None,
    limit: Tensor | None = None,
    draws: int = 1,
    precision: str = "float32",
    spacing: int | None = None,
    judge: nn.Module | None = None,
) -> AttackResult:
    """Attack one batch of images and judge the outcome.

    A sample that has fallen leaves the batch; each success is confirmed by a forward of
    its own in float32 on the final image, projected once more. That forward comes at the end, for
    all that have fallen in one batch; a sample whose success does not hold there (a lucky draw of a
    randomised model, an image outside the region) is attacked once more from the start, and what it
    spent before counts too. With a ``limit``, several ``draws``, a ``judge`` or in low precision it
    comes at once, and the sample goes on.

    Args:
        attack: what to run.
        model: maps images in [0, 1] to logits. It is left exactly as it was.
        x: float images (N, C, H, W) within the bounds of ``threat``.
        labels: int64 (N,): the true classes, or the wanted ones of a targeted threat.
        threat: what the attacker may do.
        random: one stream a sample.
        known_correct: skip the first look at the originals; the caller knows that none of them
            is adversarial already.
        best: the images of smallest margin that earlier attacks found (N, C, H, W), and their
            margins (N,): attacks that start from the best go on from there.
        limit: propagations that each sample may still cost (N,), int64; a sample leaves when it
            has reached them. None means no limit.
        draws: forwards averaged for each answer of a randomised model.
        precision: ``bf16`` or ``fp16`` searches under autocast. Every success, and the final image
            of every sample that stands, is judged in float32 all the same. Minimum-norm attacks
            search in float32 always: their images lie where a rounding decides.
        spacing: steps from one time to the next at which what has fallen leaves the batch, and
            before that 1, 2, 4, ... steps after the start, for most fall early. In between what has
            fallen is ignored, and nothing waits for the device. None means 1 on the CPU, where
            asking costs nothing, and 8 elsewhere. The result is the same, but for the draws of a
            randomised model, which hang on the batch.
        judge: the model that every success, and the final image of every sample that stands, is
            judged by, where ``model`` is a faster form of it (compiled, in another memory format)
            that may round otherwise. Minimum-norm attacks search with it too, as in float32. None
            means ``model`` itself.

    Raises:
        UsageError: the attack does not support the norm, an unknown precision, or a spacing under
            1.
        DataError: images or labels are unfit.
        ModelError: the model's output is unfit or carries no gradient.

    >>> from robustann.attacks.pgd import PGD
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))  # each pixel is a logit
    >>> x, labels = torch.tensor([[[[0.75, 0.25]]], [[[1.0, 0.125]]]]), torch.tensor([0, 0])
    >>> random = SampleRandom.create(0, torch.arange(2))
    >>> found = run(PGD(steps=20), model, x, labels, ThreatModel("linf", 0.375), random=random)
    >>> found.success.tolist(), found.forwards.tolist()[1], found.backwards.tolist()[1]
    ([True, False], 22, 20)
    """
    if precision != "float32" and precision not in LOW_PRECISION:
        raise unknown_name("precision", precision, ("float32", *LOW_PRECISION))
    low = precision != "float32" and not attack.minimum_norm
    if spacing is not None:
        at_least("spacing", spacing, 1)
    attack.check(threat)
    check_images(x, threat.bounds)
    check_labels(labels, len(x))
    if best is not None and threat.targeted:
        raise UsageError(
            "expected images handed on only in an untargeted attack, got a targeted one; leave "
            "out best"
        )
    if judge is not None and attack.minimum_norm:
        model, judge = judge, None
    device = model_device(model)
    x, labels = x.detach().to(device, torch.float32).clone(), labels.to(device).clone()
    spacing = spacing or (_SPACING if asking_waits(device) else 1)
    streams = random.to(device).fork(attack.label)
    frozen_judge = nullcontext() if judge is None else frozen(judge, random.seed)
    late = low or judge is not None
    # Several draws are asked of models whose claims often do not hold; of a limit nothing is left
    # to run a sample again; of a minimum-norm attack nothing is confirmed on the way.
    provisional = not (late or attack.minimum_norm or draws > 1 or limit is not None)
    with frozen(model, random.seed), frozen_judge:
        begun = partial(
            Oracle,
            model,
            x,
            labels,
            threat,
            streams,
            minimum_norm=attack.minimum_norm,
            best=None if best is None else (best[0].to(x), best[1].to(x)),
            limit=None if limit is None else limit.to(device),
            draws=draws,
            precision=precision if low else "float32",
            patient=spacing > 1,
            judge=judge,
        )
        oracle = begun(provisional=provisional)
        _search(attack, oracle, spacing, known_correct)
        kept = oracle.finish()
        refuted = oracle.confirm(kept, x, labels) if provisional else None
        if refuted is not None and bool(refuted.any()):
            oracle = begun()
            oracle.only(refuted)
            # The same draws of a randomised model as at the start, however long the search was.
            with _own_draws(device, "model", random.seed):
                _search(attack, oracle, spacing, known_correct)
            kept = _replaced(kept, oracle.finish(), refuted)
        return _verified(kept, judge or model, x, labels, threat, attack, draws, streams.seed, late)


def _search(attack: Attack, oracle: Oracle, spacing: int, known_correct: bool) -> None:
    """All starts of an attack, on the samples that the oracle holds."""
    if not known_correct:
        oracle.forward(oracle.x)
        oracle.compact({})
    for start in range(attack.starts):
        if not len(oracle):
            break
        oracle.restart(start)
        state = attack.init(oracle)
        for iteration in range(attack.iterations):
            state = attack.step(oracle, state, iteration)
            done = iteration + 1
            if done % spacing == 0 or (done < spacing and done & iteration == 0):
                state = oracle.compact(state)
                if not len(oracle):
                    break
        else:
            oracle.forward(state["x"])
            oracle.compact({})


def _replaced(kept: State, again: State, rows: Tensor) -> State:
    """``kept`` with what a second search found in these rows (a mask); what the first one spent
    there was spent, and goes before it."""
    for name in ("forwards", "backwards"):
        again[name] = again[name] + kept[name]
    found = again["first_success"]
    again["first_success"] = torch.where(found < 0, found, found + kept["forwards"])
    return {
        name: torch.where(rows.view((-1,) + (1,) * (value.dim() - 1)), again[name], value)
        for name, value in kept.items()
    }


def _verified(
    kept: State,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attack: Attack,
    draws: int,
    seed: int,
    late: bool,
) -> AttackResult:
    """Judge the final image of every claimed success again, in float32, inside the region; where
    it was not this model in float32 that searched (``late``), of every sample that stands."""
    reach = threat.with_eps(threat.widest(x[0].numel())) if attack.minimum_norm else threat
    final = kept["adversarial"]
    distance = threat.distance(final, x)
    if not reach.holds(final, distance):
        final = reach.project(final, x)
        # What is no image (NaN) proves nothing, whatever the model makes of it.
        unfit = ~final.isfinite().flatten(1).all(1)
        final[unfit] = x[unfit]
        distance = threat.distance(final, x)
    # Of a minimum-norm attack only the nearest is confirmed, not each that was nearer than before;
    # of a search in low precision, or with another model, what was not confirmed on the way.
    claimed = (~kept["success"] if late else kept["success"]).nonzero().squeeze(1)
    if len(claimed) and (attack.minimum_norm or late):
        rows = claimed[_aligned_rows(len(claimed), claimed.device)]
        with torch.no_grad(), _own_draws(x.device, "verify", seed):
            logits = _mean_logits(model, final[rows], draws)[: len(claimed)]
        hit = logits.argmax(1) == labels[claimed]
        asked = kept["forwards"].clone()
        within = distance[claimed] <= threat.eps
        kept["success"][claimed] = (hit if threat.targeted else ~hit) & within
        kept["prediction"][claimed] = logits.argmax(1)
        kept["margin"][claimed] = -margin(logits, labels[claimed], threat.targeted)
        kept["forwards"][claimed] += draws
        kept["first_success"][~kept["success"]] = -1
        new = kept["success"] & (kept["first_success"] < 0)
        kept["first_success"] = torch.where(new, asked, kept["first_success"])
    cpu = {name: value.cpu() for name, value in kept.items()}
    return AttackResult(
        **{**cpu, "adversarial": final.cpu(), "distance": distance.cpu()}, attack=attack
    )


def craft(
    attack: Attack,
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    random: SampleRandom,
) -> Tensor:
    """The last proposal of one start of an attack, for adversarial training: not judged.

    No sample leaves early and nothing is kept on the way, so a batch costs what the bare loop
    costs. Crafted in eval mode with frozen parameters; the model is left as it was.

    Returns:
        Images like ``x``, within the threat model, on the same device.

    >>> from robustann.attacks.fgsm import FGSM
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    >>> _ = model[1].weight.data.copy_(torch.eye(2))  # each pixel is a logit
    >>> x, random = torch.tensor([[[[0.75, 0.25]]]]), SampleRandom.create(0, torch.arange(1))
    >>> craft(FGSM(), model, x, torch.tensor([0]), ThreatModel("linf", 0.25), random=random)
    tensor([[[[0.5000, 0.5000]]]])
    """
    attack.check(threat)
    with frozen(model, random.seed):
        x = x.detach().clone()
        oracle = Oracle(model, x, labels, threat, random, judging=False)
        state = attack.init(oracle)
        for iteration in range(attack.iterations):
            state = attack.step(oracle, state, iteration)
        return state["x"][: len(x)].detach()


def check_labels(labels: Tensor, count: int) -> None:
    """Refuse labels that are not int64 (count,) and at least 0.

    Raises:
        DataError: with what was expected and what came.

    >>> check_labels(torch.tensor([0.0, 1.0]), 2)
    Traceback (most recent call last):
    robustann.errors.DataError: expected ...
    """
    expected = f"expected {count} integer labels (N,) of at least 0"
    if labels.dim() != 1 or len(labels) != count or labels.dtype != torch.int64:
        raise DataError(
            f"{expected}, got shape {tuple(labels.shape)} and type {labels.dtype}; "
            "give one int64 class a sample, not one-hot rows"
        )
    if count and int(labels.min()) < 0:
        raise DataError(f"{expected}, got {int(labels.min())}; number the classes from 0")


def check_classes(labels: Tensor, classes: int) -> None:
    """Refuse labels that the model has no logit for.

    Raises:
        DataError: with what was expected and what came.

    >>> check_classes(torch.tensor([0, 10]), 10)
    Traceback (most recent call last):
    robustann.errors.DataError: expected ...
    """
    if len(labels) and int(labels.max()) >= classes:
        raise DataError(
            f"expected labels from 0 to {classes - 1}, for the model returns {classes} logits, "
            f"got {int(labels.max())}; check that the model belongs to this data"
        )
