"""What no tokenizer is given is found, and nothing else is."""

import random
import re

import pytest

from periln.runkit.texts import (
    LONG_RUN,
    UNDECODABLE,
    described_problem,
    long_runs,
    problem_of,
    usable,
    without_long_runs,
)

SLOW = [re.compile(kind) for kind in (r"\s+", r"[^\W\d_]+", r"\d+", r"(?:[^\w\s]|_)+")]
CHARACTERS = {" ": " \t\n\u3000", "a": "aé漢", "1": "1٣", "-": "-_=🙂"}


@pytest.mark.parametrize("longest", [2, 7, 64, 100])
def test_every_long_run_is_found_and_no_other(longest):
    rng, found = random.Random(longest), 0
    for _ in range(300):
        kinds = [rng.choice(list(CHARACTERS)) for _ in range(rng.randint(0, 8))]
        lengths = [rng.choice((1, 3, longest - 1, longest, longest + 1, 5 * longest)) for _ in kinds]
        text = "".join(rng.choice(CHARACTERS[k]) for k, n in zip(kinds, lengths, strict=True) for _ in range(n))
        expected = sorted(m.span() for k in SLOW for m in k.finditer(text) if m.end() - m.start() > longest)
        assert list(long_runs(text, longest)) == expected
        pieces = list(without_long_runs(text, longest))
        assert "".join(pieces) == text and not any(list(long_runs(piece, longest)) for piece in pieces)
        found += len(expected)
    assert found > 100


def test_a_problem_is_described_and_the_text_left_out():
    half, run = "fine \ud83d here", "x\n" + " " * 20_001 + "y"
    assert problem_of(half) == UNDECODABLE and problem_of(run) == LONG_RUN
    assert described_problem(half) == "holds half of a surrogate pair ('\\ud83d' at character 6)"
    assert described_problem(run) == "has 20,002 characters of one kind in a row from character 2 on"
    said = []
    texts = [("a, row 1", "good"), ("a, row 2", half), ("b", run), ("c", "x" * 20_000)]
    assert list(usable(texts, said.append)) == ["good", "x" * 20_000]
    assert said == [f"a, row 2 is left out: its text {described_problem(half)}",
                    f"b is left out: its text {described_problem(run)}"]  # fmt: skip
