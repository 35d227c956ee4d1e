"""Chat templates as models have them, small tokenizers with one, and conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests import tiny

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITH_END = MARKED.replace("m['content'] }}{% endgen", "m['content'] + '<|im_end|>\n' }}{% endgen").replace(
    "{{ '<|im_end|>' + '\n' }}{% endfor", "{% if m['role'] != 'assistant' %}{{ '<|im_end|>\n' }}{% endif %}{% endfor"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Writes no end of turn."""
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
"""Writes the last turn of the assistant otherwise than those before it."""
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
CLOSED = CHATML.removesuffix("{% endif %}") + "{% else %}{{ eos_token }}{% endif %}"
"""Closes a conversation with an end-of-sequence token, which goes when more follows."""
DATED = "{{ 'Today: ' + strftime_now('%d %B %Y') + '\n' }}" + CHATML

MARKS = ("<|im_start|>", "<|im_end|>")


def byte_tokenizer(template: str | None, *, bos: bool = False) -> Any:
    """Make a tokenizer of bytes that joins two line breaks into one token; with ``bos`` it begins texts with one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    line = "Ċ"  # how byte-level tokenizers write a line break
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet, line + line])}
    made = Tokenizer(models.BPE(vocabulary, [(line, line)]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=template
    )
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)
    return tokenizer


def save_chat_llama(folder: Path, template: str | None = CHATML) -> Path:
    """Save a tiny Llama and a tokenizer of the words w9, w10, ... with a chat template."""
    tiny.base_model("llama").save_pretrained(folder)  # type: ignore[operator]
    names = ["<pad>", "<s>", "</s>", "<unk>", *MARKS, "system", "user", "assistant"]
    vocabulary = {name: number for number, name in enumerate(names)}
    vocabulary |= {f"w{number}": number for number in range(len(names), tiny.VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special, chat_template=template)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Make a conversation of turns of the user and the assistant."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
