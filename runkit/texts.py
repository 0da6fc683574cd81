"""What no tokenizer should be given, found before one sees it: half of a surrogate pair, or an endless run of
characters of one kind.

All code that reads text asks here, so that a text that preparation leaves out does not fail obscurely elsewhere.
"""

import re
from collections.abc import Callable, Iterable, Iterator

UNDECODABLE, LONG_RUN = "undecodable", "long run"
# Characters of one kind in a row. Ten million blanks make the regular expressions of `tokenizers` panic, and a BPE
# takes time quadratic in the length of a word to train; no real text has 20,000 letters without a space.
LONGEST_RUN = 20_000
_PROBE = 32
_KINDS = tuple(re.compile(kind) for kind in (r"\s+", r"[^\W\d_]+", r"\d+", r"(?:[^\w\s]|_)+"))


def long_runs(text: str, longest: int = LONGEST_RUN) -> Iterator[tuple[int, int]]:
    """(start, stop) of every run of more than `longest` characters of one kind: blanks, letters, digits, others.

    A run that long covers one of the places examined, so only a few of every `longest` characters are read.
    """
    step = max(1, longest // 2)
    probe = min(_PROBE, step)
    at = step
    while at <= len(text):
        kind = next((kind for kind in _KINDS if kind.fullmatch(text, at - probe, at)), None)
        if kind is not None:
            found = kind.match(text, at - probe)
            assert found is not None  # the probe is of that kind
            start, stop = _start(kind, text, at - probe), found.end()
            if stop - start > longest:
                yield start, stop
            at = stop
        at += step


def _start(kind: re.Pattern[str], text: str, inside: int) -> int:
    """Where the run begins that contains `inside` or ends before it."""
    while inside:
        back = max(0, inside - 4096)
        start = inside
        for match in kind.finditer(text, back, inside):
            start = match.start() if match.end() == inside else inside
        if start > back:
            return start
        inside = back
    return 0


def without_long_runs(text: str, longest: int) -> Iterator[str]:
    """Pieces that join to the text, none with a run of more than `longest` characters."""
    begin = 0
    for start, stop in long_runs(text, longest):
        for cut in range(start + longest, stop, longest):
            yield text[begin:cut]
            begin = cut
    yield text[begin:]


def problem_of(text: str) -> str | None:
    """`UNDECODABLE`, `LONG_RUN`, or None for a text that a tokenizer may be given."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as JSON may hold
        return UNDECODABLE
    return LONG_RUN if next(long_runs(text), None) is not None else None


def described_problem(text: str) -> str | None:
    """The problem in words that follow "the text"; None where there is none."""
    problem = problem_of(text)
    if problem == UNDECODABLE:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return f"holds half of a surrogate pair ({text[error.start]!r} at character {error.start + 1})"
    if problem == LONG_RUN:
        start, stop = next(long_runs(text))
        return f"has {stop - start:,} characters of one kind in a row from character {start + 1} on"
    return None


def usable(texts: Iterable[tuple[str, str]], tell: Callable[[str], None]) -> Iterator[str]:
    """The texts of (where, text) that a tokenizer may be given; the others are named and left out."""
    for where, text in texts:
        problem = described_problem(text)
        if problem is None:
            yield text
        else:
            tell(f"{where} is left out: its text {problem}")
