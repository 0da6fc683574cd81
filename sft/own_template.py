"""A tokenizer's own chat template: conversations as tokens, and which of them generation would have to produce.

The loss is taken on an answer and the token that ends its turn. A template with `{% generation %}` says where that is,
and is believed where its marks hold an end. Of any other template the place is derived: the conversation is rendered up
to the turn with the generation prompt, up to the end of the answer, and as a whole. Only where the first is a prefix
of the second and both are of the whole, as text and as tokens, with the answer and one control token between them, are
those tokens what the model would have to generate. Everything else is refused.
"""

import hashlib
import json
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, lru_cache, partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from periln.runkit.control_tokens import (
    JOINER,
    ROLES,
    check_control_tokens,
    control_tokens,
    ignore_joiners,
    joiners_of,
    neutralized,
)
from periln.runkit.encoding import TextEncoder, added_around
from periln.runkit.errors import UserError

MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
DATE = "26 Jul 2024"  # Llama's default, for templates that would write the day's: a run that resumes reads the same
FILE = "chat_template.jinja"
MARK = "put {% generation %} and {% endgeneration %} around the answer and its end in " + FILE
Messages = list[dict[str, str]]


def own_template(tokenizer: PreTrainedTokenizerBase) -> "OwnTemplate | None":
    """The tokenizer's chat template, checked; None if it has none, or one that writes turns as ours does.

    Raises:
        UserError: it cannot be trained with; names the tokenizer and the reason.
    """
    return _own(tokenizer, json.dumps(tokenizer.chat_template)) if tokenizer.chat_template else None


@lru_cache(maxsize=4)
def _own(tokenizer: PreTrainedTokenizerBase, template: str) -> "OwnTemplate | None":
    return None if _writes_as_ours(tokenizer) else OwnTemplate(tokenizer)


def _writes_as_ours(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a plain conversation is written as by the template of any of our versions."""
    user, assistant, end = ROLES
    if not {*ROLES} <= {*control_tokens(tokenizer)}:
        return False
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except Exception:  # whatever a template raises: ours raises nothing here
        return False
    begin = "".join(tokenizer.convert_ids_to_tokens(added_around(tokenizer)[0]))
    ours = f"{user}a{end}{assistant}b{end}"
    return text in (ours, begin + ours)


PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class AnswerJoined(UserError):
    """The first token of an answer begins in the generation prompt: no generation can produce it."""


class OwnTemplate:
    """Reads conversations by a tokenizer's own template. `end` is the id that ends an answer.

    Raises:
        UserError: a template that cannot be trained with, or content that could become a control token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer, self.name = tokenizer, tokenizer.name_or_path
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(f"the tokenizer of {self.name} has no fast (tokenizer.json) form")
        check_control_tokens(tokenizer, self.name, roles=())
        if tokenizer.pad_token is None and tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {self.name} has neither a pad_token nor an eos_token")
        self.spelled = control_tokens(tokenizer)
        unknown = getattr(tokenizer.backend_tokenizer.model, "unk_token", tokenizer.unk_token)
        ids = tokenizer.convert_tokens_to_ids(self.spelled)
        self.control = {n: token for n, token in zip(ids, self.spelled, strict=True) if token != unknown}
        try:
            self.template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(f"{self.name} has several chat templates, and none is named default") from error
        self.marked = MARKS.search(self.template) is not None
        # No template can call a text: one that would write the day's date raises, in whatever conversation it does.
        self._no_clock = {"strftime_now": ""} if "strftime_now" in self.template else {}
        self.more = {"date_string": DATE} if self._no_clock and "date_string" in self.template else {}
        self._sequences: dict[tuple[str, ...], list[int]] = {}
        self.always_joined = False
        self.end = -1  # until the probe is read
        ids, spans = self._read(PROBE, "")
        self.end = self._end_of(ids[slice(*spans[0])], "")

    def described(self) -> dict[str, Any]:
        """For the records: the template's hash, and the token that ends an answer."""
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        said = {"sha256": digest, "answer_ends_with": self.control[self.end], "generation_marks": self.marked}
        return said | self.more

    def __call__(self, messages: Messages, where: str) -> tuple[list[int], list[int]]:
        """The ids of a conversation, and a mask: 1 where the loss is taken.

        Raises:
            AnswerJoined: an answer begins with what the tokenizer joins with the generation prompt, as white space.
            UserError: the template does not write it so that this is certain; names `where`.
        """
        ids, spans = self._read(messages, where)
        mask = [0] * len(ids)
        for start, stop in spans:
            found = self._end_of(ids[start:stop], where)
            if found != self.end:
                why = f"ends one answer with {self.control[found]} and another with {self.control[self.end]}"
                raise self._refusal(where, why, f"edit {FILE}")
            mask[start:stop] = [1] * (stop - start)
        return ids, mask

    # --- rendering ---------------------------------------------------------------------------------------------
    @cached_property
    def _without_joiners(self) -> PreTrainedTokenizerBase:
        """A copy that drops joiners, where it may; what is saved with a model is left as it is."""
        copy = deepcopy(self.tokenizer)
        ignore_joiners(copy.backend_tokenizer, self.spelled)
        return copy

    @cached_property
    def _in_parts(self) -> Callable[[str], list[int]] | None:
        """Reads a rendering with neutralized contents in the parts between control tokens, each part as a text.

        None for a tokenizer to which that makes a difference.
        """
        added = [t for t in self.tokenizer.added_tokens_decoder.values() if t.content in self.spelled]
        if any(t.lstrip or t.rstrip or t.single_word for t in added):
            return None
        numbers = dict(zip(self.spelled, self.tokenizer.convert_tokens_to_ids(self.spelled), strict=True))
        longest = sorted(self.spelled, key=len, reverse=True)
        control = re.compile(f"({'|'.join(map(re.escape, longest))})")
        joiner = re.compile(joiners_of(longest))
        encoder = TextEncoder.of(self.tokenizer)

        def read(text: str) -> list[int]:
            ids: list[int] = []
            for number, part in enumerate(control.split(text)):
                ids += [numbers[part]] if number % 2 else encoder.ids(joiner.sub("", part)) if part else []
            return ids

        text = self._render(PROBE, "")
        return read if read(text) == _ids(self.tokenizer, text) else None

    def _reader(self, spells: bool) -> Callable[[str], list[int]]:
        """What reads a rendering; `spells`: a control token is neutralized in a content."""
        if not spells:
            return partial(_ids, self.tokenizer)
        in_parts = None if self.marked else self._in_parts
        return partial(_ids, self._without_joiners) if in_parts is None else in_parts

    def _reads_joiners_as_unknown(self, chat: Messages) -> bool:
        """Whether a joiner in these contents is neither dropped nor kept, but becomes the unknown token."""
        if not self.marked and self._in_parts is not None:
            return False
        encoder, unknown = TextEncoder.of(self.tokenizer), self.tokenizer.unk_token_id
        joined = {token: token[0] + JOINER + token[1:] for token in self.spelled}
        return any(
            _ids(self._without_joiners, text).count(unknown) > encoder.ids(token).count(unknown)
            for token, text in joined.items()
            if any(text in one["content"] for one in chat)
        )

    def _refusal(self, where: str, why: str, what_to_do: str) -> UserError:
        return UserError(f"{where + ': ' if where else ''}the chat template of {self.name} {why}: {what_to_do}")

    def _joined(self, where: str, number: int) -> AnswerJoined:
        why = "joins the beginning of an answer and the generation prompt in one token"
        return AnswerJoined(str(self._refusal(where, why, f"begin turn {number} with a letter")))

    def _render(self, messages: Messages, where: str, prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **self.more, **self._no_clock
            )
        except Exception as error:  # a template raises what it likes, and jinja a dozen kinds
            reason = " ".join(str(error).split())[:200]
            if self._no_clock and isinstance(error, TypeError) and "not callable" in reason:
                why = "writes the day's date (strftime_now)"
                raise self._refusal(where, why, f"write a fixed one, or none: edit {FILE}") from error
            raise self._refusal(
                where, f"refuses the conversation ({reason})", f"change the conversation, or {FILE}"
            ) from error

    def _control_of(self, ids: list[int]) -> list[int]:
        return [number for number in ids if number in self.control]

    def _expected(self, roles: tuple[str, ...], where: str) -> list[int]:
        """The control tokens of a conversation whose contents have none."""
        if roles not in self._sequences:
            plain = self._render([{"role": role, "content": "a"} for role in roles], where)
            self._sequences[roles] = self._control_of(_ids(self.tokenizer, plain))
        return self._sequences[roles]

    def _read(self, messages: Messages, where: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a conversation, and from where to where the answers are."""
        chat = [one | {"content": neutralized(one["content"], self.spelled)} for one in messages]
        read = self._reader(chat != messages)
        whole = self._render(chat, where)
        ids = read(whole)
        if chat != messages and (
            self.tokenizer.decode(ids).count(JOINER) > sum(one["content"].count(JOINER) for one in messages)
            or self._reads_joiners_as_unknown(chat)
        ):
            why = "and its tokenizer cannot keep a control token in a content apart without another character"
            raise self._refusal(where, why, "change the contents, or leave the row out")
        if self._control_of(ids) != self._expected(tuple(one["role"] for one in chat), where):
            why = "writes other control tokens around these contents than around others"
            raise self._refusal(where, why, "change the contents, or leave the row out")
        for number, one in enumerate(chat, start=1):
            if one["content"].strip() not in whole:
                why = f"leaves out or changes turn {number}, the {one['role']}'s"
                raise self._refusal(where, why, f"change the conversation, or {FILE}")
        if self.marked:
            reader = self.tokenizer if chat == messages else self._without_joiners
            return ids, self._marked_spans(reader, chat, whole, ids, where)
        return ids, self._derived_spans(read, chat, whole, ids, where)

    # --- which tokens are the answers' -------------------------------------------------------------------------
    def _marked_spans(
        self, reader: Any, chat: Messages, whole: str, ids: list[int], where: str
    ) -> list[tuple[int, int]]:
        out = reader.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self.more, **self._no_clock
        )
        if list(out["input_ids"]) != ids:
            raise self._refusal(where, "gives other tokens with its marks than without", f"edit {FILE}")
        mask = [0, *out["assistant_masks"], 0]
        edges = [n for n in range(len(ids) + 1) if mask[n] != mask[n + 1]]
        spans = list(zip(edges[::2], edges[1::2], strict=True))
        answers = sum(one["role"] == "assistant" for one in chat)
        if len(spans) != answers:
            raise self._refusal(where, f"marks {len(spans)} of {answers} answers", MARK)
        said = [(number, one["content"]) for number, one in enumerate(chat, start=1) if one["role"] == "assistant"]
        places = reader(whole, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for (number, content), (start, stop) in zip(said, spans, strict=True):
            prompt = self._render(chat[: number - 1], where, prompt=True)
            before = _ids(reader, prompt) if whole.startswith(prompt) else []
            if ids[: len(before)] != before:
                if self.end >= 0 and not self.always_joined:
                    raise self._joined(where, number)
                self.always_joined = True  # so it is with every answer, and the marks are believed
            if content.strip() not in whole[places[start][0] : places[stop - 1][1]]:
                raise self._refusal(where, f"marks something else as generated than answer {number}", MARK)
            asked = self._render(chat[: number - 1], where) if number > 1 else ""
            if whole.startswith(asked) and places[start][0] < len(asked.rstrip()):
                raise self._refusal(where, f"marks what comes before answer {number} as generated", MARK)
        return spans

    def _end_of(self, ids: list[int], where: str) -> int:
        """The control token that ends an answer of these ids; only white space may follow it."""
        last = next((n for n in reversed(range(len(ids))) if ids[n] in self.control), None)
        if last is None or self.tokenizer.decode(ids[last + 1 :]).strip():
            raise self._refusal(where, "leaves the end of the turn out of what it marks as generated", MARK)
        return ids[last]

    def _derived_spans(
        self, read: Callable[[str], list[int]], chat: Messages, whole: str, ids: list[int], where: str
    ) -> list[tuple[int, int]]:
        spans = []
        for turn, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            prompt = self._render(chat[:turn], where, prompt=True)
            if not whole.startswith(prompt):
                why = f"writes what precedes answer {turn + 1} otherwise than its generation prompt would have it"
                raise self._refusal(where, why, MARK)
            before = read(prompt)
            start = len(before)
            if ids[:start] != before:
                if self.end < 0:  # so it is with every answer
                    raise self._refusal(where, "has a generation prompt that ends inside a token of the answer", MARK)
                raise self._joined(where, turn + 1)
            stop = next((n for n in range(start, len(ids)) if ids[n] in self.control), None)
            if stop is None:
                raise self._refusal(where, "ends an answer without a control token", f"write one in {FILE}")
            token = self.control[ids[stop]]
            place = whole.find(token, len(prompt))
            if place < 0 or whole[len(prompt) : place].strip() != message["content"].strip():
                why = f"has more or less than answer {turn + 1} between its generation prompt and the next {token}"
                raise self._refusal(where, why, MARK)
            shown = whole[: place + len(token)]
            if not self._render(chat[: turn + 1], where).startswith(shown):
                raise self._refusal(where, f"writes turns up to {turn + 1} otherwise once another follows", MARK)
            if read(shown) != ids[: stop + 1]:
                raise self._refusal(where, f"has other tokens up to turn {turn + 1} once another follows", MARK)
            spans.append((start, stop + 1))
        return spans


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
