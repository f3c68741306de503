"""What every section of the run file is made of: the strict base class and the kinds of values."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: Any) -> Any:
    """Let 1e6 stand for 1000000, as people write steps; anything else goes on to the strict check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
MOST_COUNT = 2**31 - 1
"""Largest count: what indexes of 32 bits can count, and few enough to look for divisors of."""

Count = Annotated[Whole, Field(gt=0, le=MOST_COUNT)]
CountOrZero = Annotated[Whole, Field(ge=0, le=MOST_COUNT)]
MOST_WIDTH = MOST_COUNT // 4
"""Largest hidden_size: the MLP that is derived from it has four times as many features, which are counted too."""

Width = Annotated[Whole, Field(gt=0, le=MOST_WIDTH)]
Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]
Parts = Annotated[Whole, Field(gt=0, le=65536)]
"""Layers, or processes that share a model: each is listed somewhere."""
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveOrZero = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


def derived_key(**keywords: Any) -> Any:
    """Return the default of a key that is derived: None, which no complete run holds. keywords: of pydantic's Field."""
    return Field(default=None, **keywords)


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversions but whole floats to integers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
