"""Control tokens: the added tokens of a tokenizer, which a text can spell and must never become.

Whoever encodes a text by itself tells the tokenizer so (`encoding.text_ids`). A chat template cannot: what it renders
is one string of control tokens and content, encoded by whoever asked for it. So it writes a WORD JOINER behind the
first character of every control token that a content spells, and the tokenizers that we make (`ignore_joiners`) read
that as if the joiner were not there: a content has the same ids in a conversation as it has as a text. Any other
tokenizer reads the joiner, a character without width, as its bytes.
"""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from periln.runkit.errors import UserError

END_OF_TEXT, PAD = "<|end_of_text|>", "<|pad|>"
END_OF_TURN = "<|end_of_turn|>"
ROLES = ("<|user|>", "<|assistant|>", END_OF_TURN)
JOINER = "\u2060"


def control_tokens(tokenizer: Any) -> list[str]:
    """The added tokens of a tokenizer of Transformers by their ids, without runs of white space, which are text."""
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.content.strip()]


def passes(token: str) -> int:
    """How often a token must be looked for until none is left: more than once if two of them can overlap."""
    overlaps = any(token.startswith(token[start:]) for start in range(1, len(token)))
    return len(token) if overlaps else 1


def ignore_joiners(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Have a tokenizer drop the joiner of neutralized `tokens`, before anything else that it does to a text.

    A joiner anywhere else stays. The normalizer works on what is left when the added tokens were found, so nothing
    can become one of them.
    """
    first = dict.fromkeys(token[0] for token in tokens)
    rests = {char: "|".join(re.escape(t[1:]) for t in tokens if t[0] == char) for char in first}
    found = "|".join(f"(?<={re.escape(char)}){JOINER}(?=(?:{rest}))" for char, rest in rests.items())
    drop = normalizers.Replace(Regex(found), "")
    own = tokenizer.normalizer
    tokenizer.normalizer = drop if own is None else normalizers.Sequence([drop, own])


def ignores_joiners(tokenizer: Any) -> bool:
    """Whether a fast tokenizer drops the joiners of its control tokens."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    tokens = control_tokens(tokenizer)
    return normalizer is not None and all(normalizer.normalize_str(t[0] + JOINER + t[1:]) == t for t in tokens)


def check_control_tokens(tokenizer: Any, name: object) -> None:
    """See that content can be kept apart from the control tokens of `tokenizer`.

    Raises:
        UserError: no token for conversations, or one that content could become all the same; names both.
    """
    tokens = control_tokens(tokenizer)
    if missing := [token for token in ROLES if token not in tokens]:
        raise UserError(f"the tokenizer of {name} has no token {', '.join(missing)} for conversations")
    for token in tokens:
        if reason := _slips_through(token):
            raise UserError(f"the tokenizer of {name} has the token {token!r}: content could become it, {reason}")
    late = [token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    late = [token for token in late if token in tokens]
    if late and tokenizer.backend_tokenizer.normalizer is not None:
        raise UserError(
            f"the tokenizer of {name} looks for the token {late[0]!r} in normalized text: content could become it, "
            "spelled otherwise"
        )


def _slips_through(token: str) -> str | None:
    """How a content could become the token although it is neutralized, or None."""
    if len(token) == 1:
        return "because no joiner fits into a single character"
    for role in ROLES:
        if token != role and token.startswith(role):
            return f"because it begins with {role}, which the chat template writes"
    ends = (token[start:] for start in range(1, len(token)))
    if token not in ROLES and any(END_OF_TURN.startswith(end) or end.startswith(END_OF_TURN) for end in ends):
        return f"because {END_OF_TURN}, which the chat template writes, may be a part of it"
    return None
