"""Whether the classes of a model and of the data are the same, in the same order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from robustann.data.loading import ImageData
from robustann.errors import DataError

_SHOWN = 5
# What formats call classes that nobody named.
_NUMBERED = re.compile(r"(?:class|label)?[ _-]?(\d+)", re.IGNORECASE)


def in_order_of(
    data: ImageData, class_names: Sequence[str] | None
) -> tuple[ImageData, tuple[str, ...]]:
    """The data with its classes numbered as the model's outputs are, and what is to be told.

    Names are compared without regard to case, spaces, hyphens and underscores. The same names in
    another order are renumbered; so are data that have some of the model's classes. Where one of
    both has numbers for names, the order is taken for the same.

    Args:
        data: the data.
        class_names: the model's, one an output; None where it does not name them.

    Raises:
        DataError: classes that the model does not have, or another number of them.

    >>> from robustann.data import from_arrays
    >>> data = from_arrays(torch.rand(20, 1, 4, 4), torch.arange(20) % 2,
    ...                    class_names=["cat", "dog"])
    >>> matched, told = in_order_of(data, ["dog", "cat"])
    >>> data.test.labels.tolist(), matched.test.labels.tolist()
    ([0, 1, 0, 1], [1, 0, 1, 0])
    >>> print(told[0])
    classes: the model has them in another order than the data (dog, cat instead of cat, dog); ...
    """
    if class_names is None:
        return data, ()
    numbers, names, told = renumbering(data.class_names, class_names)
    if numbers is None:
        return replace(data, class_names=names), ()
    train, validation, test = (
        split.relabelled(numbers[split.labels])
        for split in (data.train, data.validation, data.test)
    )
    matched = replace(data, train=train, validation=validation, test=test, class_names=names)
    return matched, (told,)


def renumbering(
    data_names: Sequence[str], model_names: Sequence[str]
) -> tuple[Tensor | None, tuple[str, ...], str]:
    """The model's number of each class of the data, the names to use, and what is to be told.

    The numbers are None where they stay as they are.

    Raises:
        DataError: classes that the model does not have, or another number of them.

    >>> renumbering(["cat", "dog"], ["Dog", "bird", "Cat"])[0]
    tensor([2, 0])
    """
    ours, theirs = tuple(data_names), tuple(model_names)
    if _numbered(theirs) or _numbered(ours):
        if len(theirs) != len(ours):
            raise DataError(
                f"expected a model with one output for each of the {len(ours)} classes of the "
                f"data, got {len(theirs)} outputs; name the model's classes with --class-names, "
                "or choose data that belong to the model"
            )
        if _numbered(theirs) and not _numbered(ours):
            return None, ours, ""
        # The data's labels are numbers; the model knows what they mean.
        return None, theirs, ""
    place = {_key(name): number for number, name in enumerate(theirs)}
    if len(place) < len(theirs):
        place = {name: number for number, name in enumerate(theirs)}
        wanted = list(ours)
    else:
        wanted = [_key(name) for name in ours]
    unknown = [name for name, key in zip(ours, wanted, strict=True) if key not in place]
    if unknown:
        lacking = sorted(set(place) - set(wanted))
        hint = (
            "if the data's names mean the model's outputs in this order, say so with "
            f"--class-names {','.join(ours[:3])}{',...' * (len(ours) > 3)}"
            if len(ours) == len(theirs)
            else "choose data that belong to the model, or say what its outputs mean with "
            "--class-names"
        )
        raise DataError(
            f"expected data with the model's {len(theirs)} classes ({_some(theirs)}), got "
            f"{len(ours)}, of which the model does not know {len(unknown)} ({_some(unknown)})"
            f"{f'; missing: {_some(lacking)}' if lacking else ''}; {hint}"
        )
    numbers = torch.tensor([place[key] for key in wanted])
    if len(ours) == len(theirs) and numbers.equal(torch.arange(len(ours))):
        return None, theirs, ""
    if len(ours) < len(theirs):
        told = (
            f"classes: the data have {len(ours)} of the model's {len(theirs)}; the labels were "
            "renumbered by name"
        )
    else:
        first = next(i for i, number in enumerate(numbers.tolist()) if number != i)
        shown = slice(first, first + 3)
        told = (
            "classes: the model has them in another order than the data "
            f"({', '.join(theirs[shown])} instead of {', '.join(ours[shown])}); the labels were "
            "renumbered by name"
        )
    return numbers, theirs, told


def _numbered(names: Sequence[str]) -> bool:
    """Whether the names say no more than the place: 0, 1, ... or LABEL_0, LABEL_1, ..."""
    places = [_NUMBERED.fullmatch(name) for name in names]
    return all(match and int(match[1]) == i for i, match in enumerate(places))


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
