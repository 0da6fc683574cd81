"""Texts as a model reads them: the ids of a text, in bounded memory, and what precedes and follows them.

What begins a document is decided by the tokenizer's own post-processor. Preparation records it in the data's index;
the tokenizer of every checkpoint does the same to a prompt, and adds nothing after it; losses, samples and
conversations ask here. Imports no torch and no transformers, for the sake of the processes that only encode.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from periln.runkit.control_tokens import without_control_tokens
from periln.runkit.errors import UserError

PIECE = 1 << 18  # characters encoded at once: the library takes about 150 bytes of memory for each
BACK = 1 << 15  # characters before a cut whose words are found to try it: more than any run of one kind has
NEAR = 1024  # characters on both sides of a cut that are encoded to try it
TRIES = 8  # places of each kind that are tried


class TextEncoder:
    """Ids of texts alone: no special token is added, and a control token spelled in a text is just text.

    A text longer than `PIECE` is cut into pieces where the pre-tokenizer begins a new word in the whole text as well as
    in the piece, which is tested for each cut; the ids are those of the whole. A tokenizer without such places (one
    that writes a blank before every text, or knows no words) gets pieces that end with a line, where possible.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = without_control_tokens(tokenizer)
        # A tokenizer's file may ask to cut or pad texts.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    @classmethod
    def of(cls, tokenizer: Any) -> "TextEncoder":
        """A separate encoder for a tokenizer of Transformers, which is not changed.

        Raises:
            UserError: it is not a fast one.
        """
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"the tokenizer {type(tokenizer).__name__} has no fast (tokenizer.json) form")
        return cls(tokenizer.backend_tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """The ids of each text, uint32, and whether they may differ from those of the text encoded at once."""
        found: list[list[np.ndarray]] = [[] for _ in texts]
        differ = [False] * len(texts)
        group: list[str] = []
        owners: list[int] = []
        size = 0

        def encode() -> None:
            encodings = self.tokenizer.encode_batch_fast(group, add_special_tokens=False)
            for owner, encoding in zip(owners, encodings, strict=True):
                found[owner].append(np.array(encoding.ids, dtype=np.uint32))
            group.clear()
            owners.clear()

        for number, text in enumerate(texts):
            for piece, exact in self._pieces(text):
                if group and size + len(piece) > PIECE:
                    encode()
                    size = 0
                group.append(piece)
                owners.append(number)
                size += len(piece)
                differ[number] |= not exact
        if group:
            encode()
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in found], differ

    def ids(self, text: str) -> list[int]:
        """The ids of one text."""
        ids: list[int] = self([text])[0][0].tolist()
        return ids

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces that join to the text, and whether the cut behind each changes no id."""
        start = 0
        while len(text) - start > PIECE:
            stop, exact = self._cut(text, start)
            yield text[start:stop], exact
            start = stop
        yield text[start:], True

    def _cut(self, text: str, start: int) -> tuple[int, bool]:
        if self.tokenizer.pre_tokenizer is not None:
            for cut in self._candidates(text, start):
                if self._changes_nothing(text, start, cut):
                    return cut, True
        line = text.rfind("\n", start + PIECE // 2, start + PIECE) + 1
        return line or start + PIECE, False

    def _candidates(self, text: str, start: int) -> Iterator[int]:
        """Places in the second half of the next `PIECE`: behind line ends, before blanks, wherever words begin."""
        low, high = start + PIECE // 2, start + PIECE
        for mark, behind in (("\n", 1), (" ", 0)):
            place = high
            for _ in range(TRIES):
                place = text.rfind(mark, low, place)
                if place < 0:
                    break
                cut = place + behind
                if not text[cut].isspace() or not text[cut - 1].isspace():
                    yield cut
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text[high - NEAR : high])
        yield from (high - NEAR + begin for _, (begin, _) in words[-2 : -2 - TRIES : -1] if 0 < begin < NEAR)

    def _changes_nothing(self, text: str, start: int, cut: int) -> bool:
        """Whether the text from `start`, which begins at an earlier cut, has the same ids cut at `cut`.

        Pre-tokenizers read from left to right and look a character ahead, and a model sees a word by itself: so it
        is enough that the words up to the cut and behind it are those of the two parts. They are looked for from
        farther back than any word begins. The ids near the cut are compared too, for added tokens, which are found
        before there are words.
        """
        near, far = text[max(start, cut - NEAR) : cut], text[cut : cut + NEAR]
        if self._ids(near + far) != self._ids(near) + self._ids(far):
            return False
        before = text[max(start, cut - BACK) : cut]
        return self._words(before + far) == self._words(before) + self._words(far)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _words(self, text: str) -> list[str]:
        if self.tokenizer.normalizer is not None:
            text = self.tokenizer.normalizer.normalize_str(text)
        return [word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def text_ids(tokenizer: Any) -> Callable[[str], list[int]]:
    """Text to its ids alone, for any tokenizer of Transformers; one that is not fast reads a text at once."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        return TextEncoder.of(tokenizer).ids
    return lambda text: list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@contextmanager
def unchanged(tokenizer: Any) -> Iterator[None]:
    """Restore what a tokenizer's file says about truncation and padding: each call resets it."""
    fast: Any = getattr(tokenizer, "backend_tokenizer", None)
    cut, pad = (None, None) if fast is None else (fast.truncation, fast.padding)
    try:
        yield
    finally:
        if cut is not None:
            fast.enable_truncation(**cut)
        if pad is not None:
            fast.enable_padding(**pad)


# --- what surrounds a text -------------------------------------------------------------------------------------
def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer of Transformers adds before and after a text.

    Raises:
        UserError: it does something else to a text.
    """
    bare, whole = (list(tokenizer("a", add_special_tokens=added)["input_ids"]) for added in (False, True))
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return whole[:begin], whole[begin + len(bare) :]
    raise UserError(f"the tokenizer reads 'a' as {bare}, and with its special tokens as {whole}: it is not understood")


def before_text(tokenizer: Any) -> list[int]:
    """The ids before the first text: what begins a document, or else the end of the previous document."""
    begin, _ = added_around(tokenizer)
    ends = [number for number in (tokenizer.eos_token_id, tokenizer.bos_token_id) if number is not None]
    return begin or ends[:1]


def begin_documents_with(tokenizer: Any, begin: Sequence[int]) -> None:
    """Have a fast tokenizer put `begin` before a text, nothing behind it, and call its last token `bos_token`.

    Nothing after it: a prompt would then end with the end of the document that is to be continued. Where nothing
    begins a document, `bos_token` is the token that ends the previous one, which is what every library starts with.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    begin = list(begin)
    if added_around(tokenizer) != (begin, []):
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"the tokenizer {type(tokenizer).__name__} has no fast (tokenizer.json) form")
        tokens = tokenizer.convert_ids_to_tokens(begin)
        first, second = ([*(f"{token}:{i}" for token in tokens), f"${'AB'[i]}:{i}"] for i in (0, 1))
        special = list(dict(zip(tokens, begin, strict=True)).items())
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=first, pair=first + second, special_tokens=special
        )
        for flag in ("add_bos_token", "add_eos_token"):  # with these, a loaded tokenizer builds a new post-processor
            tokenizer.init_kwargs.pop(flag, None)
            setattr(tokenizer, f"_{flag}", False)
    start = begin[-1] if begin else tokenizer.eos_token_id
    known = (start,) if begin else (start, None)  # a tokenizer without `bos_token` may stay so
    if start is not None and tokenizer.bos_token_id not in known:
        tokenizer.bos_token = tokenizer.convert_ids_to_tokens(start)
