"""Text, or prompts and answers, of which every token is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.tasks.base import IGNORED, PERCENT, Encoded, Metric, Sums, Task, upcast
from fedlora.tasks.chat import ChatTemplate, shared_length, without_answer
from fedlora.tasks.texts import tokenise

if TYPE_CHECKING:
    import torch

    from fedlora.config import DataSection


class CausalLM(Task):
    """Next-token prediction. With prompts and answers, or conversations, only the answers have a loss."""

    name = "causal-lm"
    title = "the next token of a text, or of an answer"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    causal = True
    keys = ("data.prompt", "data.answer", "data.messages", "data.template", "data.choices")
    labelled = classes = False
    answers = True
    scores: ClassVar = {
        "perplexity": Metric(maximize=False, digits=2),
        "exact_match": PERCENT,
        "rougeL": PERCENT,
        "bleu": Metric(digits=1),
        "choice_accuracy": PERCENT,
        "choice_accuracy_norm": PERCENT,
    }
    primary = "perplexity"
    by_domain = True

    def columns(self, data: DataSection) -> dict[str, str]:
        """Return the columns of the messages, of prompt and answer, or of the text.

        Without a column of answers the first of the choices is the answer.
        """
        if data.messages is not None:
            return {"messages": data.messages}
        if data.prompt is None:
            return {"text": data.text}
        return {"prompt": data.prompt} | ({} if data.answer is None else {"answer": data.answer})

    def label_array(self, labels: list[Any]) -> None:
        """Return nothing: the tokens are the labels."""

    def encode(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise conversations by the chat template, or a text, or prompt and answer one after the other.

        An end-of-sequence token closes a text and an answer.
        """
        eos = tokenizer.eos_token_id
        if "messages" in examples:
            rows, labels, refused = ChatTemplate(tokenizer).encode(examples["messages"])
            texts = ["\n".join(message["content"] for message in messages) for messages in examples["messages"]]
            tags = [label[:max_length] for label in labels]
            return Encoded([ids[:max_length] for ids in rows], rows, texts, tags=tags, refused=refused)
        if "text" in examples:
            texts = examples["text"]
            # A tokenizer may close its rows itself.
            rows = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in tokenise(tokenizer, texts, None)["input_ids"]]
            starts = [0] * len(rows)
        else:
            texts = [a + b for a, b in zip(examples["prompt"], examples["answer"], strict=True)]
            prompts = self.prompts(tokenizer, examples)
            answers = tokenise(tokenizer, examples["answer"], None, special=False)["input_ids"]
            rows = [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)]
            starts = [len(prompt) for prompt in prompts]
        return Encoded([ids[:max_length] for ids in rows], rows, texts, starts)

    def prompts(self, tokenizer: Any, examples: Mapping[str, list[Any]]) -> list[list[int]]:
        """Return the token ids that each example's answer follows; of a conversation, the assistant's last turn.

        Raises
        ------
        ChatError
            If the chat template does not take a conversation.
        """
        if "messages" in examples:
            return ChatTemplate(tokenizer).prompts([without_answer(messages) for messages in examples["messages"]])
        eos, found = tokenizer.eos_token_id, tokenise(tokenizer, examples["prompt"], None)["input_ids"]
        return [ids[:-1] if ids[-1:] == [eos] else ids for ids in found]

    def answered(
        self, tokenizer: Any, examples: Mapping[str, list[Any]], answers: Sequence[Sequence[str]]
    ) -> list[tuple[list[int], int]]:
        """Return every example's prompt with each of its answers: token ids, and how many of them are the prompt's.

        No token closes the answers.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
        examples : Mapping[str, list]
        answers : sequence of sequence of str
            By example; the result has them one after the other.

        Raises
        ------
        ChatError
            If the chat template does not take a conversation.
        """
        prompts = self.prompts(tokenizer, examples)
        flat = [(number, answer) for number, of_one in enumerate(answers) for answer in of_one]
        if "messages" not in examples:
            ends = tokenise(tokenizer, [answer for _, answer in flat], None, special=False)["input_ids"]
            return [([*prompts[n], *end], len(prompts[n])) for (n, _), end in zip(flat, ends, strict=True)]
        template = ChatTemplate(tokenizer)
        before = [template.write(without_answer(messages), prompt=True) for messages in examples["messages"]]
        rows = tokenise(tokenizer, [before[n] + answer for n, answer in flat], None, special=False)["input_ids"]
        return [(ids, shared_length(prompts[n], ids)) for (n, _), ids in zip(flat, rows, strict=True)]

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
