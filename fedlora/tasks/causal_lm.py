"""Text, or prompts and answers, of which every token is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedlora.tasks.base import IGNORED, PERCENT, Encoded, Metric, Sums, Task, upcast
from fedlora.tasks.chat import ChatTemplate, shared_length, without_answer
from fedlora.tasks.long_texts import lost, split_conversations, split_row
from fedlora.tasks.texts import tokenise

if TYPE_CHECKING:
    import torch

    from fedlora.config import DataSection
    from fedlora.output_layer import HiddenStates


class CausalLM(Task):
    """Next-token prediction. With prompts and answers, or conversations, only the answers have a loss."""

    name = "causal-lm"
    title = "the next token of a text, or of an answer"
    auto_class = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    causal = takes_hidden_states = True
    keys = (
        *("data.prompt", "data.answer", "data.messages", "data.template", "data.choices"),
        *("data.long_texts", "data.packing"),
    )
    labelled = classes = False
    answers = splits = packs = True
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
        if "messages" in examples:
            rows, labels, refused = ChatTemplate(tokenizer).encode(examples["messages"])
            tags = [label[:max_length] for label in labels]
            return Encoded([ids[:max_length] for ids in rows], rows, _texts(examples), tags=tags, refused=refused)
        rows, starts = self._rows(tokenizer, examples)
        return Encoded([ids[:max_length] for ids in rows], rows, _texts(examples), starts)

    def split(self, tokenizer: Any, examples: Mapping[str, list[Any]], max_length: int, token_types: bool) -> Encoded:
        """Tokenise as :meth:`encode`, and put what is longer than ``max_length`` into several rows.

        Every row of an answer begins with the prompt (:func:`~fedlora.tasks.long_texts.split_row`); conversations are
        split between their exchanges (:func:`~fedlora.tasks.long_texts.split_conversations`).
        """
        if "messages" in examples:
            found = split_conversations(ChatTemplate(tokenizer), examples["messages"], max_length)
            found.texts = _texts(examples)
            return found
        rows, starts = self._rows(tokenizer, examples)
        heads = starts
        if "text" in examples:
            # What a tokenizer writes before every text is in front of every row.
            (empty,) = tokenise(tokenizer, [""], None)["input_ids"]
            first = [token for token in empty if token != tokenizer.eos_token_id]
            heads = [shared_length(first, ids) for ids in rows]
        pieces = [split_row(ids, head, max_length) for ids, head in zip(rows, heads, strict=True)]
        return Encoded(
            tokens=[piece.ids for of_one in pieces for piece in of_one],
            whole=rows,
            texts=_texts(examples),
            starts=[max(piece.start, start) for of_one, start in zip(pieces, starts, strict=True) for piece in of_one],
            of=[number for number, of_one in enumerate(pieces) for _ in of_one],
            lost=[lost(ids, of_one) for ids, of_one in zip(rows, pieces, strict=True)],
        )

    def _rows(self, tokenizer: Any, examples: Mapping[str, list[Any]]) -> tuple[list[list[int]], list[int]]:
        """Return the ids of texts, or of prompts and answers, and how many leading ones of each have no loss."""
        eos = tokenizer.eos_token_id
        if "text" in examples:
            found = tokenise(tokenizer, examples["text"], None)["input_ids"]
            # A tokenizer may close its rows itself.
            rows = [ids if ids[-1:] == [eos] else [*ids, eos] for ids in found]
            return rows, [0] * len(rows)
        prompts = self.prompts(tokenizer, examples)
        answers = tokenise(tokenizer, examples["answer"], None, special=False)["input_ids"]
        rows = [[*prompt, *answer, eos] for prompt, answer in zip(prompts, answers, strict=True)]
        return rows, [len(prompt) for prompt in prompts]

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

    def loss(self, logits: torch.Tensor | HiddenStates, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats over each example's own target tokens.

        Parameters
        ----------
        logits : Tensor [N, T, vocabulary] or HiddenStates
        labels : Tensor [N, T]
            The tokens, -100 where no loss is taken; position t predicts token t + 1.
        """
        losses, counts = token_losses(logits, labels)
        return losses / counts.clamp(min=1)

    def packed_loss(
        self, logits: torch.Tensor | HiddenStates, labels: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of :meth:`loss` over the examples in each row.

        Parameters
        ----------
        logits : Tensor [N, T, vocabulary] or HiddenStates
        labels : Tensor [N, T]
            As in :meth:`loss`; the first token of every example has none.
        weights : Tensor [N, T]
            One over the number of target tokens of each token's example.
        """
        losses, _ = _losses_by_token(logits, labels)
        return (losses * weights[:, 1:].to(losses)).sum(1)

    def drawn_labels(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor, outputs: int) -> torch.Tensor:
        """Return the tokens themselves."""
        return ids.masked_fill(~mask, IGNORED)

    def statistics(
        self, logits: torch.Tensor | HiddenStates, labels: torch.Tensor, label_names: Sequence[str] | None
    ) -> dict[str, torch.Tensor]:
        """Sum the losses of an example's tokens, and count these."""
        losses, counts = token_losses(logits, labels)
        return {"loss": losses, "count": counts.double()}

    def metrics(self, sums: Sums, examples: Sums | None = None) -> dict[str, float]:
        """Return the loss of a token, and the perplexity: long examples weigh more."""
        loss = float(sums["loss"] / max(1.0, sums["count"]))
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def _texts(examples: Mapping[str, list[Any]]) -> list[str]:
    """Return what each example is tokenised from."""
    if "messages" in examples:
        return ["\n".join(message["content"] for message in messages) for messages in examples["messages"]]
    if "text" in examples:
        return examples["text"]
    return [prompt + answer for prompt, answer in zip(examples["prompt"], examples["answer"], strict=True)]


def token_losses(logits: torch.Tensor | HiddenStates, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each example's summed token cross-entropy [N] in nats, and its number of target tokens [N]."""
    losses, chosen = _losses_by_token(logits, labels)
    return losses.sum(1), chosen.sum(1)


def _losses_by_token(logits: torch.Tensor | HiddenStates, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy [N, T - 1] of the tokens behind the first, 0 without a target, and which are targets."""
    import torch
    from torch.nn import functional

    values = logits if isinstance(logits, torch.Tensor) else logits.states
    targets = labels[:, 1:]
    chosen = targets != IGNORED
    # Only target positions meet the vocabulary-sized softmax: prompts and padding would be most of its work. On a GPU
    # choosing them would wait for it to count them.
    every = values.is_cuda
    flat, wanted = (
        (values[:, :-1].flatten(0, 1), targets.flatten()) if every else (values[:, :-1][chosen], targets[chosen])
    )
    if isinstance(logits, torch.Tensor):
        losses = functional.cross_entropy(upcast(flat), wanted, reduction="none", ignore_index=IGNORED)
    else:
        losses = logits.output.losses(flat, wanted).to(labels.device)
    if every:
        return losses.reshape(targets.shape), chosen
    summed = torch.zeros(targets.shape, dtype=losses.dtype, device=losses.device)
    return summed.masked_scatter(chosen, losses), chosen
