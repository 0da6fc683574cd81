"""Conversations in LIMA's schema, and the chat template that they are written with.

A row is {"conversations": [user, assistant, ...], "source": ...}. `mini` is our own small set; `hub` is the
real GAIR/lima (its single-turn rows, as in the Peri-LN paper: 1,000 of them).
"""

import json
from pathlib import Path
from typing import Any

from runkit.errors import UserError

MINI_FILE = Path(__file__).parent / "data" / "mini_conversations.jsonl"
LIMA = "GAIR/lima"

# `generation` marks what the loss is taken on: the assistant's words and the token that ends its turn.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "<|assistant|>{% generation %}{{ message['content'] }}<|end_of_turn|>{% endgeneration %}"
    "{%- else -%}"
    "<|user|>{{ message['content'] }}<|end_of_turn|>"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
END_OF_TURN = "<|end_of_turn|>"


def to_messages(conversation: list[str], where: str) -> list[dict[str, str]]:
    """A list of turns, user first, as chat messages.

    Raises:
        UserError: no assistant turn, an odd number of turns, or an empty one; names the row.
    """
    if len(conversation) < 2:
        raise UserError(f"{where}: a conversation with {len(conversation)} turn(s) has no assistant's answer")
    if len(conversation) % 2:
        raise UserError(f"{where}: {len(conversation)} turns: the last one is a user's without an answer")
    for turn, text in enumerate(conversation):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: turn {turn + 1} is empty")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(conversation)]


def _mini_rows() -> list[dict[str, Any]]:
    lines = MINI_FILE.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def _lima_rows() -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        try:
            rows = load_dataset(LIMA, split="train")
        except RuntimeError as error:
            # A repository with a loading script, which `datasets` no longer runs: the Hub keeps its rows as parquet.
            if "script" not in str(error):
                raise
            rows = load_dataset(LIMA, split="train", revision="refs/convert/parquet")
    except Exception as error:  # datasets and the Hub raise a dozen kinds; the user needs one sentence
        raise UserError(
            f"{LIMA} cannot be loaded: it is gated, so accept its terms on its Hub page and log in (hf auth login); "
            f"or the Hub does not answer ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    return [row for row in rows if row["source"] != "multi_turn"]


def load_conversations(data: str) -> list[list[dict[str, str]]]:
    """The conversations of `mini` or `hub`, as chat messages.

    Raises:
        UserError: a data set that cannot be had, or a malformed row; names it.
    """
    rows = _lima_rows() if data == "hub" else _mini_rows()
    name = LIMA if data == "hub" else MINI_FILE.name
    return [to_messages(row["conversations"], f"{name}, row {i + 1}") for i, row in enumerate(rows)]
