"""Conversations in LIMA's schema.

A row is {"conversations": [user, assistant, ...], "source": ...}, or {"messages": [{"role", "content"}, ...]}; messages
may begin with a system turn, and a content may be a list of text parts, which are joined. `hub` is the
real GAIR/lima (its 1,000 single-turn rows, as in the Peri-LN paper; the 30 others on demand), `mini` our own small
set, anything else the path of a .jsonl.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from periln.runkit.control_tokens import END_OF_TURN as END_OF_TURN
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import write_if_free
from periln.runkit.hub import hub_reason, quiet_hub
from periln.runkit.texts import described_problem
from periln.sft.chat_template import CHAT_TEMPLATE as CHAT_TEMPLATE
from periln.sft.chat_template import REFUSED

MINI_FILE = Path(__file__).parent / "data" / "mini_conversations.jsonl"
LIMA = "GAIR/lima"

ROLE_NAMES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversations:
    """The training data: chat messages, the name of each one's row, and their source."""

    messages: list[list[dict[str, str]]]
    rows: list[int]  # row numbers in the source, from 1
    name: str
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.messages)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.messages, ensure_ascii=False).encode()).hexdigest()

    def export(self, path: Path) -> None:
        """Write a .jsonl with the one column `messages`, as the `trl sft` command line reads it.

        Raises:
            UserError: the file exists and holds something else.
        """
        lines = (json.dumps({"messages": one}, ensure_ascii=False) + "\n" for one in self.messages)
        write_if_free(path, "".join(lines))


def to_messages(conversation: list[str], where: str) -> list[dict[str, str]]:
    """A list of turns, user first, as chat messages.

    Raises:
        UserError: no assistant turn, an odd number of turns, or an empty one; names the row.
    """
    if not isinstance(conversation, list):
        raise UserError(f"{where}: `conversations` must be a list of turns, not {type(conversation).__name__}")
    if len(conversation) < 2:
        raise UserError(f"{where}: a conversation with {len(conversation)} turn(s) has no assistant's answer")
    if len(conversation) % 2:
        raise UserError(f"{where}: {len(conversation)} turns: the last one is a user's without an answer")
    return [
        {"role": ROLE_NAMES[1 + i % 2], "content": _checked(text, f"{where}: turn {i + 1}")}
        for i, text in enumerate(conversation)
    ]


def _checked(text: Any, turn: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{turn} is empty")
    if problem := described_problem(text):
        raise UserError(f"{turn} cannot be trained on: it {problem}")
    return text


def _joined(content: Any, turn: str) -> Any:
    """The text of a content that is a list of text parts; any other content as it is."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content, start=1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(f"{turn}: content part {number} is of type {kind!r}; only text is known")
    return "".join(part["text"] for part in content)


def check_messages(messages: Any, where: str) -> list[dict[str, str]]:
    """Chat messages, text parts joined, if user and assistant take turns in them; the first may be a system turn.

    Raises:
        UserError: an unknown role, no assistant turn, two turns of one role in a row, tool calls or reasoning, a
            content that is not text; names the row.
    """
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError(f"{where}: `messages` must be a list of role and content")
    roles = [m.get("role") for m in messages]
    for turn, (role, message) in enumerate(zip(roles, messages, strict=True)):
        if role not in ROLE_NAMES:
            known = "only system, user and assistant are known"
            raise UserError(f"{where}: turn {turn + 1} has the role {role!r}; {known}")
        if role == "system" and turn:
            raise UserError(f"{where}: turn {turn + 1} has the role 'system', which only the first may have")
        if turn and role == roles[turn - 1]:
            raise UserError(f"{where}: turns {turn} and {turn + 1} are both the {role}'s")
        if refused := [name for name in REFUSED if message.get(name)]:
            raise UserError(f"{where}: turn {turn + 1} ({role}) has {refused[0]}; only content is known")
    if "assistant" not in roles:
        raise UserError(f"{where}: a conversation with {len(roles)} turn(s) has no assistant's answer")
    first = 1 if roles[0] == "system" else 0
    if roles[first] != "user":
        raise UserError(f"{where}: the first turn is the assistant's, not a user's")
    turns = [f"{where}: turn {number}" for number in range(1, len(messages) + 1)]
    contents = [_joined(m.get("content"), turn) for m, turn in zip(messages, turns, strict=True)]
    system = [{"role": "system", "content": _checked(contents[0], turns[0])}] if first else []
    return system + to_messages(contents[first:], where)


def _file_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"data: {path} cannot be read ({reason}): give hub, mini, or a .jsonl") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path.name}, row {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict) or not {"conversations", "messages"} & set(row):
                raise UserError(f"{path.name}, row {number}: has neither `conversations` nor `messages`")
            rows.append(row)
    return rows


def _revision_of(rows: Any) -> str | None:
    """The Hub's commit that a data set was read from: the folder of its cached file is named after it."""
    for file in getattr(rows, "cache_files", None) or []:
        name = Path(file["filename"]).parent.name
        if len(name) == 40 and all(c in "0123456789abcdef" for c in name):
            return name
    return None


def _lima_rows(revision: str | None) -> tuple[list[dict[str, Any]], str | None]:
    from datasets import load_dataset

    quiet_hub()
    try:
        try:
            rows = load_dataset(LIMA, split="train", revision=revision)
        except RuntimeError as error:
            # A repository with a loading script, which `datasets` no longer runs: the Hub keeps its rows as parquet.
            if "script" not in str(error) or revision is not None:
                raise
            rows = load_dataset(LIMA, split="train", revision="refs/convert/parquet")
    except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
        raise UserError(f"{LIMA} cannot be loaded: {hub_reason(error)}") from error
    return list(rows), _revision_of(rows)


def load_conversations(data: str, multi_turn: bool = False, revision: str | None = None) -> Conversations:
    """The conversations of `hub`, `mini` or a .jsonl; those of a source `...multi_turn` only if asked for.

    Raises:
        UserError: a data set that is not available, or a malformed row; names it.
    """
    if data == "hub":
        name, (rows, revision) = LIMA, _lima_rows(revision)
    else:
        path = MINI_FILE if data == "mini" else Path(data)
        name, rows = path.name, _file_rows(path)
    messages, numbers = [], []
    for number, row in enumerate(rows, start=1):
        if str(row.get("source", "")).endswith("multi_turn") and not multi_turn:
            continue
        where = f"{name}, row {number}"
        chat = "messages" in row
        messages.append(check_messages(row["messages"], where) if chat else to_messages(row["conversations"], where))
        numbers.append(number)
    if not messages:
        raise UserError(f"{name} holds no conversation to train on")
    return Conversations(messages, numbers, name, revision if data == "hub" else None)
