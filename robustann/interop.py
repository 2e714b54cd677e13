"""Models of other toolkits, and models for them: ART, foolbox, scikit-learn, any function.

Everything here takes and gives modules that map images (N, C, H, W) in [0, 1] to logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robustann.errors import ModelError, UsageError
from robustann.extras import need


class FromCallable(nn.Module):
    """A function as a module: scores without gradients. Made by :func:`from_callable`.

    >>> model = from_callable(lambda x: x.reshape(len(x), -1), 2)
    >>> type(model).__name__, model(torch.zeros(1, 1, 1, 2)).requires_grad
    ('FromCallable', False)
    """

    def __init__(
        self, function: Callable[[Any], Any], num_classes: int, takes: Literal["numpy", "torch"]
    ) -> None:
        super().__init__()
        self.function = function
        self.num_classes = num_classes
        self.takes = takes

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, classes)."""
        held = images.detach().cpu().float()
        # A copy, because the function may change what it is given.
        given: Any = held.numpy().copy() if self.takes == "numpy" else held.clone()
        with torch.no_grad():
            came = self.function(given)
        return _scores(came, len(images), self.num_classes).to(images.device)

    def __deepcopy__(self, memo: object) -> FromCallable:
        # What a function closes over (a session, a connection) often cannot be copied.
        return FromCallable(self.function, self.num_classes, self.takes)


def from_callable(
    function: Callable[[Any], Any],
    num_classes: int,
    *,
    takes: Literal["numpy", "torch"] = "numpy",
) -> nn.Module:
    """A black box: any function from images to scores, such as a service or another framework.

    It has no gradients, so attacks by scores and by the predicted class apply, and an audit says
    that those by gradients were left out.

    Args:
        function: takes float32 images (N, C, H, W) in [0, 1], gives scores (N, ``num_classes``),
            logits or probabilities; or N integer classes, where it tells nothing more.
        num_classes: how many classes there are.
        takes: what it is given; it may return either.

    Raises:
        UsageError: no function, or fewer than 2 classes.

    >>> model = from_callable(lambda x: x.reshape(len(x), -1) @ np.eye(4)[:, :3], 3)
    >>> model(torch.full((2, 1, 2, 2), 0.5)).tolist()
    [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    >>> from_callable(lambda x: np.array([2]), 3)(torch.zeros(1, 1, 2, 2)).tolist()
    [[0.0, 0.0, 1.0]]
    """
    if not callable(function):
        raise UsageError(
            f"expected a function from images to scores, got {type(function).__name__}"
        )
    if takes not in ("numpy", "torch"):
        raise UsageError(f"expected takes as 'numpy' or 'torch', got {takes!r}")
    if num_classes < 2:
        raise UsageError(f"expected at least 2 classes, got {num_classes}")
    return FromCallable(function, num_classes, takes)


class FromFoolbox(nn.Module):
    """A foolbox model as a module. Made by :func:`from_foolbox`.

    >>> grey_levels = FromFoolbox(lambda x: x.flatten(1), bounds=(0.0, 255.0), net=None)
    >>> grey_levels(torch.tensor([[[[0.0, 1.0]]]]))
    tensor([[  0., 255.]])
    """

    def __init__(self, model: Any, bounds: tuple[float, float], net: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.bounds = bounds
        # Registered, so that its parameters are seen and set to evaluation.
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        low, high = self.bounds
        logits: Tensor = self.model(images * (high - low) + low)
        return logits


def from_foolbox(model: Any) -> nn.Module:
    """A module from a ``foolbox.PyTorchModel``: with its bounds, its preprocessing, its gradients.

    Raises:
        UsageError: something else.

    >>> from_foolbox("net")
    Traceback (most recent call last):
    robustann.errors.UsageError: expected a foolbox.PyTorchModel, got str; ...
    """
    bounds = getattr(model, "bounds", None)
    if not callable(model) or bounds is None:
        raise UsageError(
            f"expected a foolbox.PyTorchModel, got {type(model).__name__}; for any other function "
            "use from_callable"
        )
    low, high = bounds
    return FromFoolbox(model, (float(low), float(high)), _held_by(model)).eval()


def _held_by(model: Any) -> nn.Module | None:
    """The module inside a foolbox model, which keeps it in a closure."""
    function = getattr(model, "_model", None)
    if not inspect.isfunction(function):
        return None
    held = inspect.getclosurevars(function).nonlocals.get("model")
    return held if isinstance(held, nn.Module) else None


def to_foolbox(model: nn.Module, *, device: str | torch.device | None = None) -> Any:
    """A ``foolbox.PyTorchModel`` of a module that takes images in [0, 1].

    Raises:
        UsageError: foolbox is not installed.
    """
    foolbox = need("foolbox", "foolbox")
    return foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=device or _device(model))


class FromArt(nn.Module):
    """An ART classifier's network as a module. Made by :func:`from_art`.

    >>> model = from_art(to_art(nn.Flatten(), shape=(1, 1, 2), num_classes=2))
    >>> model(torch.tensor([[[[0.25, 0.75]]]]))
    tensor([[0.2500, 0.7500]])
    """

    def __init__(
        self,
        net: nn.Module,
        bounds: tuple[Tensor, Tensor],
        mean: Tensor | None,
        std: Tensor | None,
    ) -> None:
        super().__init__()
        self.net = net
        for name, value in (("low", bounds[0]), ("high", bounds[1]), ("mean", mean), ("std", std)):
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes)."""
        low, high = self.get_buffer("low"), self.get_buffer("high")
        x = images * (high - low) + low
        if self.mean is not None:
            x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        logits: Tensor = self.net(x)
        return logits


def from_art(classifier: Any) -> nn.Module:
    """A module from a classifier of the Adversarial Robustness Toolbox.

    A ``PyTorchClassifier`` keeps its gradients, its ``clip_values`` (which become [0, 1]) and its
    normalisation. One with preprocessing defences, and a classifier of another framework, becomes
    a black box.

    Raises:
        UsageError: no classifier of ART.

    >>> from_art("net")
    Traceback (most recent call last):
    robustann.errors.UsageError: expected a classifier of ART, got str; ...
    """
    if not hasattr(classifier, "predict") or not hasattr(classifier, "clip_values"):
        raise UsageError(
            f"expected a classifier of ART, got {type(classifier).__name__}; for any other "
            "function use from_callable"
        )
    clip = (0.0, 1.0) if classifier.clip_values is None else classifier.clip_values
    low, high = (torch.tensor(np.asarray(value, dtype=np.float32)) for value in clip)
    net = getattr(classifier, "model", None)
    steps = list(getattr(classifier, "preprocessing_operations", None) or [])
    known = [step for step in steps if type(step).__name__.startswith("StandardisationMeanStd")]
    if isinstance(net, nn.Module) and len(known) == len(steps) <= 1:
        mean = std = None
        if known:
            mean, std = (_per_channel(getattr(known[0], name)) for name in ("mean", "std"))
        return FromArt(net, (low, high), mean, std).eval()

    def predict(images: Any) -> Any:
        return classifier.predict((images * (high - low).numpy() + low.numpy()).astype("float32"))

    return from_callable(predict, int(classifier.nb_classes))


def to_art(model: nn.Module, *, shape: tuple[int, int, int], num_classes: int) -> Any:
    """An ART ``PyTorchClassifier`` of a module that takes images in [0, 1].

    Args:
        model: gives logits.
        shape: (C, H, W) of the images.
        num_classes: how many logits it gives.

    >>> made = to_art(nn.Flatten(), shape=(1, 1, 2), num_classes=2)
    >>> made.clip_values.tolist(), made.predict(np.array([[[[0.25, 0.75]]]], np.float32)).tolist()
    ([0.0, 1.0], [[0.25, 0.75]])
    """
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model=model.eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu" if _device(model).type == "cpu" else "gpu",
    )


def from_predict_proba(estimator: Any, *, flatten: bool = True) -> nn.Module:
    """A black box from an estimator of scikit-learn's kind: ``predict_proba`` and ``classes_``.

    Column i of its probabilities is taken for class i, so its ``classes_`` must be 0, 1, 2, ...

    Args:
        estimator: fitted.
        flatten: hand it rows (N, C * H * W), as scikit-learn wants; else images (N, C, H, W).

    Raises:
        UsageError: it has no ``predict_proba``, is not fitted, or its classes are others.

    >>> from sklearn.linear_model import LogisticRegression
    >>> x, y = np.array([[0.0], [0.2], [0.8], [1.0]]), np.array([0, 0, 1, 1])
    >>> model = from_predict_proba(LogisticRegression(C=100).fit(x, y))
    >>> model(torch.ones(1, 1, 1, 1)).argmax(1).item()
    1
    """
    classes = getattr(estimator, "classes_", None)
    if not hasattr(estimator, "predict_proba") or classes is None:
        raise UsageError(
            f"expected a fitted estimator with predict_proba and classes_, got "
            f"{type(estimator).__name__}; for any other function use from_callable"
        )
    if list(classes) != list(range(len(classes))):
        raise UsageError(
            f"expected the classes 0 to {len(classes) - 1} in an estimator, got "
            f"{list(classes)[:5]}; fit it on numbers from 0"
        )

    def predict(images: Any) -> Any:
        return estimator.predict_proba(images.reshape(len(images), -1) if flatten else images)

    return from_callable(predict, len(classes))


class ToPredictProba:
    """A module with the face of a fitted scikit-learn classifier. Made by
    :func:`to_predict_proba`.

    >>> made = ToPredictProba(nn.Flatten(), (1, 1, 2), 2)
    >>> made.predict([[0.25, 0.75], [1.0, 0.0]]).tolist()
    [1, 0]
    """

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], num_classes: int) -> None:
        self.model = model.eval()
        self.shape = shape
        self.classes_ = np.arange(num_classes)

    def predict_proba(self, x: Any) -> Any:
        """Probabilities (N, classes), float64, of images (N, C, H, W) or rows (N, C * H * W)."""
        images = torch.as_tensor(np.asarray(x, dtype=np.float32)).reshape(-1, *self.shape)
        with torch.no_grad():
            logits = self.model(images.to(_device(self.model)))
        return logits.double().softmax(1).cpu().numpy()

    def predict(self, x: Any) -> Any:
        """Classes (N,)."""
        return self.classes_[self.predict_proba(x).argmax(1)]


def to_predict_proba(
    model: nn.Module, *, shape: tuple[int, int, int], num_classes: int
) -> ToPredictProba:
    """What explainers and tools for scikit-learn want, from a module.

    Args:
        model: maps images in [0, 1] to logits.
        shape: (C, H, W) that rows are reshaped to.
        num_classes: how many logits it gives.

    >>> made = to_predict_proba(nn.Flatten(), shape=(1, 1, 2), num_classes=2)
    >>> made.predict_proba([[0.5, 0.5]]).tolist(), made.predict([[0.0, 1.0]]).tolist()
    ([[0.5, 0.5]], [1])
    """
    return ToPredictProba(model, shape, num_classes)


def _scores(came: Any, rows: int, classes: int) -> Tensor:
    try:
        found = torch.as_tensor(came).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"expected the function to return an array of scores, got {type(came).__name__} "
            f"({error}); return a NumPy array or a tensor"
        ) from error
    if found.shape == (rows,) and not found.is_floating_point() and not found.is_complex():
        low, high = (int(found.min()), int(found.max())) if rows else (0, 0)
        if low < 0 or high >= classes:
            raise ModelError(
                f"expected classes from 0 to {classes - 1} from the function, got {low} to {high}"
            )
        return nn.functional.one_hot(found.long(), classes).float()
    if found.shape != (rows, classes):
        raise ModelError(
            f"expected the function to return scores of shape ({rows}, {classes}) or {rows} "
            f"integer classes, got {found.dtype} of shape {tuple(found.shape)}; correct "
            "num_classes or the function"
        )
    return found.float()


def _per_channel(values: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(values, dtype=np.float32)).flatten()
    return found.view(-1, 1, 1)


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
