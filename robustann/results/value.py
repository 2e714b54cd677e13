"""What all values of a result have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from robustann.rounding import Number

Share = Annotated[Number, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Value(BaseModel):
    """Frozen, and without fields that nobody knows."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)
