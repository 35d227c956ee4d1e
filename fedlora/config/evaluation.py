"""``[evaluation]``: the answers of a language model, scored as people quote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from fedlora.config.section import Positive, Section
from fedlora.errors import InputError
from fedlora.tasks import get_task

if TYPE_CHECKING:
    from fedlora.config.schema import Config


class EvaluationSection(Section):
    """``[evaluation]``: how a language model's answers to the test examples are scored, before and after training."""

    kind: Literal["none", "generate", "choice"] = Field(
        default="none",
        description="Score answers that the model generates (exact match, ROUGE-L, BLEU), or its choice among "
        "data.choices, on the server's test examples before the first round and after the last.",
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=100_000)] = Field(
        default=64, description="Longest answer that is generated, in tokens.", json_schema_extra={"unit": "tokens"}
    )
    max_examples: Positive | None = Field(
        default=None,
        description="Maximum number of test examples that are scored, drawn at random; all by default.",
        json_schema_extra={"unit": "examples"},
    )

    def check(self, config: Config) -> None:
        """Refuse to score what asks for no answer."""
        if self.kind == "none":
            return
        data = config.data
        if not get_task(config.model.task).answers:
            raise InputError("evaluation.kind", self.kind, "scores a language model; set model.task = causal-lm")
        if data.prompt is None and data.messages is None:
            remedy = "needs answers to compare with; name data.messages, or data.prompt and data.answer"
            raise InputError("evaluation.kind", self.kind, remedy)
        if self.kind == "choice" and data.choices is None:
            raise InputError("data.choices", None, "is required with evaluation.kind = choice: the column of answers")

    def unused(self, config: Config) -> Iterator[tuple[str, str]]:
        """Each kind has keys of its own."""
        if self.kind != "generate":
            yield "max_new_tokens", f"evaluation.kind is {self.kind}"
        if self.kind == "none":
            yield "max_examples", "evaluation.kind is none"
