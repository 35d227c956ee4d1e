"""The pages that people read, as blocks of code; and blocks of shell, as single commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("experiments/*/*.md")),
]


DRAWN = ("you ──",)
"""How indented blocks begin that are drawings."""


@dataclass(frozen=True)
class Block:
    """A block of code on a page.

    Attributes
    ----------
    page : str
        From the repository's root.
    line : int
    language : str
        What follows the fence; ``shell`` or ``drawing`` of a block that is indented.
    text : str
    """

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell's block.

    Attributes
    ----------
    page : str
    words : tuple of str
        With variables that the page sets put in; without redirections and assignments.
    """

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


@cache
def blocks() -> tuple[Block, ...]:
    """Return the blocks of all pages, in their order."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
            if token.type in ("fence", "code_block"):
                indented = "drawing" if token.content.startswith(DRAWN) else "shell"
                language = token.info.strip() if token.type == "fence" else indented
                found.append(Block(name, (token.map or [0])[0] + 1, language, token.content))
    return tuple(found)


@cache
def inline_commands() -> tuple[Command, ...]:
    """Return the commands of fedlora in running text, without those that are a name alone."""
    found = {}
    for page in PAGES:
        for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
            for child in token.children or []:
                words = tuple(child.content.split())
                if child.type == "code_inline" and words[:1] == ("fedlora",) and len(words) > 1:
                    command = Command(str(page.relative_to(ROOT)), words)
                    found[str(command)] = command
    return tuple(found.values())


def in_language(language: str, page: str = "") -> list[Block]:
    """Return the blocks of a language, of one page or of all."""
    return [block for block in blocks() if block.language == language and page in ("", block.page)]


@cache
def commands(page: str) -> tuple[Command, ...]:
    """Return the commands of a page, in their order."""
    known: dict[str, str] = {}
    return tuple(command for block in in_language("shell", page) for command in _commands(block, known))


def in_block(block: Block) -> list[Command]:
    """Return the commands of a block that needs no variable of another block."""
    return list(_commands(block, {}))


def _commands(block: Block, known: dict[str, str]) -> Iterator[Command]:
    text = re.sub(r"<<(\w+)\n.*?^\1$", "", block.text, flags=re.DOTALL | re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        line = re.sub(r"\$([A-Z]+)\b", lambda found: known.get(found[1], found[0]), line)
        words: list[str] = []
        for word in [*_words(line), "&&"]:
            if word in ("&&", ";"):
                if words:
                    yield Command(block.page, tuple(words))
                words = []
            elif not words and (assigned := re.fullmatch(r"([A-Z]+)=(.*)", word)):
                known[assigned[1]] = assigned[2]
            else:
                words.append(word)


def _words(line: str) -> list[str]:
    """Return the words of a line; what is written to a file is left out."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = list(lexer)
    while ">" in words:
        place = words.index(">")
        del words[place : place + 2]
    return words
