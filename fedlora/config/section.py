"""What all sections share: strict types, printable texts, and the ranges that several keys have in common."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from fedlora.config.schema import Config

# Upper bounds lie far above what anybody trains with: they keep slips out, such as a rate of 1e30.
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Fraction = Annotated[float, Field(gt=0, le=1)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e3)]
Norm = Annotated[float, Field(ge=1e-6, le=1e6)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Share = Annotated[float, Field(gt=0, lt=1)]
FileFormat = Literal["csv", "tsv", "jsonl", "json", "parquet"]

NODES = "nodes"
"""As ``data.name``: the training examples lie on the nodes that the run finds, and not here."""
SERVER = "server"
"""As ``data.test``, in the config that a node makes for itself: the test examples are the server's."""

_LONGEST_TEXT = 4096
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Section(BaseModel):
    """A table of a TOML file: unknown keys and other types are errors, and so are texts that name nothing."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, str_min_length=1, str_max_length=_LONGEST_TEXT
    )

    @field_validator("*")
    @classmethod
    def _printable(cls, value: Any) -> Any:
        if any(_CONTROL.search(text) for text in _texts(value)):
            raise PydanticCustomError("control_character", "should have no line breaks or other control characters")
        return value

    def check(self, config: Config) -> None:
        """Refuse combinations of this section's keys, and of these with other sections', that no single key shows.

        Raises
        ------
        InputError
        """

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Yield (keys, why) of this section's keys that the rest of the config leaves without use."""
        yield from ()


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value; sections check their own."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
