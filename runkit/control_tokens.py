"""Control tokens: added tokens of a tokenizer that steer a model; a text may spell one, but must never become one.

These are the added tokens that the tokenizer calls special, and those that are written as markup: in brackets, such as
`<think>` or `[INST]`. Any other added token is a word of the vocabulary, and a text that has the word has the token;
the same holds for a run of blanks that is a token.

Whoever encodes a text by itself reads it with a tokenizer that has no control tokens to find (`encoding.TextEncoder`).
A chat template cannot: what it renders is one string of control tokens and content, encoded by its caller. So
it writes a WORD JOINER behind the first character of every control token that a content spells, and the tokenizers that
we make (`ignore_joiners`) read that as if the joiner were not there: a content has the same ids in a conversation
as in a plain text. Any other tokenizer reads the joiner, a character without width, as its bytes.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers

from periln.runkit.errors import UserError

END_OF_TEXT, PAD = "<|end_of_text|>", "<|pad|>"
END_OF_TURN = "<|end_of_turn|>"
ROLES = ("<|user|>", "<|assistant|>", END_OF_TURN)
JOINER = "\u2060"
BRACKETS = ("<>", "[]", "{}", "()", "〈〉", "《》", "【】", "⟨⟩", "＜＞")
NOT_A_TEXT = "\ufdd0 "  # before the name of an entry of a vocabulary: a noncharacter, and a blank, which no word has


def is_control(content: str, special: bool) -> bool:
    """Whether an added token steers, and is not a word (or a run of white space) of the vocabulary."""
    written = content.strip()
    return bool(written) and (special or (len(written) > 2 and written[0] + written[-1] in BRACKETS))


def control_tokens(tokenizer: Any) -> list[str]:
    """The control tokens of a tokenizer of Transformers, by their ids."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return [token.content for _, token in added if is_control(token.content, token.special)]


def without_control_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that reads every text as text: the ids are the same, except those of control tokens, which no text has.

    `encode_special_tokens` alone does not do that: it leaves the added tokens that are not called special, and the
    models that look up whole words or pieces (Unigram, WordLevel, WordPiece, a BPE with `ignore_merges`) find the
    control tokens in their own vocabularies. Those entries get names here that no text spells.
    """
    data = json.loads(tokenizer.to_str())
    added, model = data["added_tokens"], data["model"]
    control = {token["content"] for token in added if is_control(token["content"], token["special"])}
    vocabulary = model["vocab"]
    pieces = [piece for piece, _ in vocabulary] if isinstance(vocabulary, list) else list(vocabulary)
    new = {name: NOT_A_TEXT + name for name in control & set(pieces)}
    if isinstance(vocabulary, list):  # of a Unigram: pieces and their scores
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocabulary]
    else:
        model["vocab"] = {new.get(piece, piece): number for piece, number in vocabulary.items()}
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]
    if "merges" in model:
        pairs, unnamed = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]), new.keys()
        model["merges"] = [pair for pair in pairs if unnamed.isdisjoint(pair) and "".join(pair) not in new]
    for token in added:
        token["special"] |= token["content"] in control
        token["content"] = new.get(token["content"], token["content"])
    copy = Tokenizer.from_str(json.dumps(data))
    copy.encode_special_tokens = True
    return copy


def _around(spelled: str) -> tuple[str, ...]:
    """Texts with a spelled token, in which a model may see it as a word or as part of one."""
    return spelled, f"a{spelled}a", f"a {spelled} a"


def _read_as_text(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[str]:
    """The tokens that a tokenizer reads as text if it does not look for special tokens."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True

    def is_text(token: str) -> bool:
        ids = [plain.encode(text, add_special_tokens=False).ids for text in _around(token)]
        return not any(plain.token_to_id(token) in found for found in ids)

    return [token for token in tokens if is_text(token)]


def passes(token: str) -> int:
    """How often a token must be looked for until none is left: more than once if two of them can overlap."""
    overlaps = any(token.startswith(token[start:]) for start in range(1, len(token)))
    return len(token) if overlaps else 1


def neutralized(text: str, tokens: Sequence[str]) -> str:
    """A text with a joiner behind the first character of every control token that it spells."""
    first = {token[0] for token in tokens}
    if not any(char in text for char in first):
        return text
    for token in tokens:
        for _ in range(passes(token) if token in text else 0):
            text = text.replace(token, token[0] + JOINER + token[1:])
    return text


def joiners_of(tokens: Sequence[str]) -> str:
    """The pattern of the joiners in neutralized `tokens`."""
    first = dict.fromkeys(token[0] for token in tokens)
    rests = {char: "|".join(re.escape(t[1:]) for t in tokens if t[0] == char) for char in first}
    return "|".join(f"(?<={re.escape(char)}){JOINER}(?=(?:{rest}))" for char, rest in rests.items())


def ignore_joiners(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Have a tokenizer drop the joiner of neutralized `tokens`, before it does anything else to a text.

    A joiner anywhere else stays, and so does that of a token that the model would find in its own vocabulary. The
    normalizer works on what is left after the added tokens are found, so nothing can become one of them.
    """
    tokens = _read_as_text(tokenizer, tokens)
    if not tokens:
        return
    drop = normalizers.Replace(Regex(joiners_of(tokens)), "")
    own = tokenizer.normalizer
    tokenizer.normalizer = drop if own is None else normalizers.Sequence([drop, own])


def ignores_joiners(tokenizer: Any) -> bool:
    """Whether a fast tokenizer drops the joiners of its control tokens wherever it may."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    tokens = _read_as_text(tokenizer.backend_tokenizer, control_tokens(tokenizer))
    joined = [(token[0] + JOINER + token[1:], token) for token in tokens]
    return all(normalizer is not None and normalizer.normalize_str(text) == token for text, token in joined)


def check_control_tokens(tokenizer: Any, name: object, roles: Sequence[str] = ROLES) -> None:
    """See that content can be kept apart from the control tokens of `tokenizer`.

    `roles` are those that the chat template writes, the end of a turn last; none where that is the tokenizer's own.

    Raises:
        UserError: a token for conversations is missing, or content could still become one; names both.
    """
    tokens = control_tokens(tokenizer)
    if missing := [token for token in roles if token not in tokens]:
        raise UserError(
            f"the tokenizer of {name} has no token {', '.join(missing)} for conversations, and no chat template of "
            "its own: put the model's chat_template.jinja next to it"
        )
    words = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content not in tokens]
    for token in (*tokens, *words):
        if reason := _slips_through(token, token in words, roles):
            raise UserError(f"the tokenizer of {name} has the token {token!r}: content could become it, {reason}")
    late = [token.content for token in tokenizer.added_tokens_decoder.values() if token.normalized]
    late = [token for token in late if token in tokens]
    if late and tokenizer.backend_tokenizer.normalizer is not None:
        raise UserError(
            f"the tokenizer of {name} looks for the token {late[0]!r} in normalized text: content could become it, "
            "spelled otherwise"
        )
    for token in tokens:
        if token != tokenizer.unk_token and _is_found(tokenizer, token):
            raise UserError(
                f"the tokenizer of {name} has the token {token!r}: content could become it, because the tokenizer "
                "drops the joiner and finds the token in its vocabulary"
            )


def _is_found(tokenizer: Any, token: str) -> bool:
    """Whether a content that spells the token becomes it although neutralized."""
    number = tokenizer.convert_tokens_to_ids(token)
    texts = _around(token[0] + JOINER + token[1:])
    return any(number in tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)


def _slips_through(token: str, is_word: bool, roles: Sequence[str]) -> str | None:
    """How a content could become the token although neutralized, or (a word) take part of a turn's token; or None."""
    if len(token) == 1 and not is_word:
        return "because no joiner fits into a single character"
    for role in roles:
        if token != role and token.startswith(role):
            return f"because it begins with {role}, which the chat template writes"
    ends = (token[start:] for start in range(1, len(token)))
    turn = roles[-1] if roles else ""
    if roles and token not in roles and any(turn.startswith(end) or end.startswith(turn) for end in ends):
        return f"because {turn}, which the chat template writes, may be a part of it"
    return None
