"""Which modules train."""

from __future__ import annotations

from torch import nn


def kept_in_eval_mode(model: nn.Module) -> list[str]:
    """Names of the modules, in eval mode now, that stay so while the others train.

    Those of which every parameter is frozen, as of batch normalisation whose statistics are to
    stay. What has no parameters (dropout) follows the module that it is part of, unless it was put
    into eval mode by itself. A model that comes in eval mode as a whole is thus trained whole.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout()).eval()
    >>> kept_in_eval_mode(model)
    []
    >>> _ = model[1].requires_grad_(False)
    >>> kept_in_eval_mode(model)
    ['1']
    """
    kept: list[str] = []

    def visit(module: nn.Module, name: str, follows: bool) -> None:
        flags = [parameter.requires_grad for parameter in module.parameters()]
        stays = not module.training and (not any(flags) if flags else follows)
        if stays:
            kept.append(name)
        for child, part in module.named_children():
            visit(part, f"{name}.{child}" if name else child, stays or module.training)

    visit(model, "", follows=False)
    return kept
