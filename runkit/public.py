"""What may leave the machine: values without local paths, and a search of bytes for what must not be in them."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_PATH_INSIDE = re.compile(r"(?:file://|(?<![\w/.])(?:~|[A-Za-z]:)?)[/\\](?:[^\s/\\'\"|]+[/\\])+([^\s/\\'\"|]*)")
_PATH = re.compile(r"(?:~|[A-Za-z]:)?[/\\].*?([^/\\]*)[/\\]?", re.DOTALL)
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY")
_BLOCK = 1 << 22


def public(value: Any) -> Any:
    """The value with absolute paths cut down to their last name; they say where something is, not what it is."""
    if isinstance(value, dict):
        return {public(key): public(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [public(x) for x in value]
    if not isinstance(value, str):
        return value
    whole = _PATH.fullmatch(value)
    return f"…/{whole[1]}" if whole else _PATH_INSIDE.sub(r"…/\1", value)


def path_in(text: str) -> str | None:
    """The first absolute path of two names or more in a text, or None."""
    found = _PATH_INSIDE.search(text)
    return found[0] if found else None


def local_roots(*paths: Path) -> list[str]:
    """The ways in which local places are written: each path as given and resolved, the home, the working folder.

    A root of one name, such as `/root`, has a slash behind it, so that no other word matches.
    """
    roots = {
        str(p) for path in (*paths, Path.cwd(), Path.home()) for p in (Path(path).absolute(), Path(path).resolve())
    }
    return sorted(root if root.count(os.sep) > 1 else f"{root}{os.sep}" for root in roots if root != os.sep)


def secrets(*more: str | None) -> list[str]:
    """The tokens that this process knows: those given, and those in the environment."""
    found = {*more, *(os.environ.get(name) for name in _SECRET_VARIABLES)}
    return sorted(x for x in found if x and len(x) >= 6)


def found_in(content: bytes | Path, roots: Iterable[str], tokens: Iterable[str]) -> str | None:
    """What of these is found in bytes or in a file, in words that do not repeat a token; None if nothing is."""
    needles = [(root.encode(), f"the local path {root}") for root in roots]
    needles += [(token.encode(), "an access token") for token in tokens]
    overlap = max((len(needle) for needle, _ in needles), default=0) + 64
    for block in _blocks(content, overlap):
        for needle, name in needles:
            if needle in block:
                return name
        if _SECRET.search(block):
            return "what looks like an access token"
    return None


def _blocks(content: bytes | Path, overlap: int) -> Iterable[bytes]:
    """The content piece by piece, each with the end of the previous one."""
    if isinstance(content, bytes):
        yield content
        return
    tail = b""
    with open(content, "rb") as file:
        while block := file.read(_BLOCK):
            yield tail + block
            tail = block[-overlap:]
