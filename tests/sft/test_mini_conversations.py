"""Checks on the bundled instruction conversations in sft/data/mini_conversations.jsonl."""

import json
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "sft" / "data" / "mini_conversations.jsonl"
TURNS = {"mini": 2, "mini_multi_turn": 4}
MAX_CHARS = 1400


@pytest.fixture(scope="module")
def rows():
    text = DATA.read_bytes().decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_count(rows):
    assert len(rows) >= 60
    assert set(Counter(row["source"] for row in rows)) == set(TURNS)


def test_schema(rows):
    for row in rows:
        assert set(row) == {"conversations", "source"}
        assert isinstance(row["conversations"], list)
        assert all(isinstance(turn, str) for turn in row["conversations"])


def test_turns_are_non_empty_and_stripped(rows):
    for row in rows:
        for turn in row["conversations"]:
            assert turn
            assert turn == turn.strip()


def test_turn_counts(rows):
    for row in rows:
        assert len(row["conversations"]) % 2 == 0
        assert len(row["conversations"]) == TURNS[row["source"]]


def test_no_duplicate_prompts_or_answers(rows):
    turns = Counter(" ".join(turn.lower().split()) for row in rows for turn in row["conversations"])
    assert [turn for turn, n in turns.items() if n > 1] == []


def test_length(rows):
    too_long = [row["conversations"][0] for row in rows if sum(map(len, row["conversations"])) >= MAX_CHARS]
    assert too_long == []


def test_text_is_ascii(rows):
    # the parsed text, since JSON escapes would hide other characters in the file itself
    assert all(turn.isascii() for row in rows for turn in row["conversations"])
