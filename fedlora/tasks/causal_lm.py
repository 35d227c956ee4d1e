"""Text, or prompts and answers, of which every token is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.tasks.base import IGNORED, Encoded, Metric, Sums, Task, upcast
from fedlora.tasks.texts import tokenise

if TYPE_CHECKING:
    import torch

    from fedlora.config import DataSection


class CausalLM(Task):
    """Next-token prediction. With prompts and answers, only the answers have a loss."""

    name = "causal-lm"
    title = "the next token of a text, or of an answer"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    causal = True
    keys = ("data.prompt", "data.answer")
    labelled = classes = False
    scores: ClassVar = {"perplexity": Metric(maximize=False, digits=2)}
    primary = "perplexity"
    by_domain = True

    def columns(self, data: DataSection) -> dict[str, str]:
        """Return the columns of prompt and answer, or that of the text."""
        if data.prompt is not None and data.answer is not None:
            return {"prompt": data.prompt, "answer": data.answer}
        return {"text": data.text}

    def label_array(self, labels: list[Any]) -> None:
        """Return nothing: the tokens are the labels."""

    def encode(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise a text, or prompt and answer one after the other; an end-of-sequence token closes the row."""
        eos = tokenizer.eos_token_id
        if "text" in examples:
            texts = examples["text"]
            # A tokenizer may close its rows itself.
            rows = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in tokenise(tokenizer, texts, None)["input_ids"]]
            starts = [0] * len(rows)
        else:
            texts = [a + b for a, b in zip(examples["prompt"], examples["answer"], strict=True)]
            found = tokenise(tokenizer, examples["prompt"], None)["input_ids"]
            prompts = [ids[:-1] if ids[-1:] == [eos] else ids for ids in found]
            answers = tokenise(tokenizer, examples["answer"], None, special=False)["input_ids"]
            rows = [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)]
            starts = [len(prompt) for prompt in prompts]
        return Encoded([ids[:max_length] for ids in rows], rows, texts, starts)

    def outputs(self, label_names: Sequence[str] | None) -> int | None:
        """Return None: the model's own vocabulary."""
        return None

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats over each example's own target tokens.

        Parameters
        ----------
        logits : Tensor [N, T, vocabulary]
        labels : Tensor [N, T]
            The tokens, -100 where no loss is taken; position t predicts token t + 1.
        """
        losses, counts = token_losses(logits, labels)
        return losses / counts.clamp(min=1)

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Return the tokens themselves."""
        return ids.masked_fill(~mask, IGNORED)

    def statistics(
        self, logits: torch.Tensor, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Sum the losses of an example's tokens, and count these."""
        losses, counts = token_losses(logits, labels)
        return {"loss": losses, "count": counts.double()}

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return the loss of a token, and the perplexity: long examples weigh more."""
        loss = float(sums["loss"] / max(1.0, sums["count"]))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's summed token cross-entropy [N] in nats, and its number of target tokens [N]."""
    import torch
    from torch.nn import functional

    targets = labels[:, 1:]
    chosen = targets != IGNORED
    if logits.is_cuda:
        # Choosing positions would wait for the GPU to count them.
        flat = upcast(logits[:, :-1]).flatten(0, 1)
        every = functional.cross_entropy(flat, targets.flatten(), reduction="none", ignore_index=IGNORED)
        return every.reshape(targets.shape).sum(1), chosen.sum(1)
    # Only target positions meet the vocabulary-sized softmax: prompts and padding would be most of its work.
    losses = functional.cross_entropy(upcast(logits[:, :-1][chosen]), targets[chosen], reduction="none")
    summed = torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device)
    summed = summed.masked_scatter(chosen, losses)
    return summed.sum(1), chosen.sum(1)
