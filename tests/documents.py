"""The code blocks of README.md and of the documentation's pages, for the tests that run or read them."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_FENCE = re.compile(r"^( *)```(\w+)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def pages() -> list[Path]:
    """README.md and the pages."""
    return [README, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of a page in one language."""
    return [code for _, name, code in _FENCE.findall(page.read_text()) if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of a page's `bash` blocks; comments are left out, continued lines joined."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            for command in re.split(r"\s&&\s", line):
                if words := shlex.split(command, comments=True):
                    yield words


def own_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """(`periln VERB` or the module's name, the words behind it) of every command of ours."""
    for words in commands(page):
        if words[0] == "periln-convert":
            yield "periln convert", words[1:]
        elif words[0] == "periln":
            yield " ".join(words[:2]), words[2:]
        elif "-m" in words and re.match(r"(eval|scripts|sft|model_cards)\.", words[words.index("-m") + 1]):
            at = words.index("-m") + 1
            yield words[at], words[at + 1 :]
