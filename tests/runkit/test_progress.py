"""Progress bars: lively at a terminal, seldom in a log."""

import io
import sys
from argparse import Namespace

from tqdm import tqdm

from periln.runkit.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_in_half_a_minute_and_a_terminal_ten_a_second(monkeypatch):
    intervals = []
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(Namespace(bar=0), 3, "training", "step") as bar:
            bar.update(3)
            intervals.append((bar.mininterval, bar.maxinterval))
        assert "3/3" in stream.getvalue()
    assert intervals == [(30, 30), (0.1, 10)]


def test_a_log_has_lines_and_no_control_characters_whatever_runs_beside(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress_bar(Namespace(bar=1), 3, "evaluation", "part") as bar:  # the second of two that run side by side
        for _ in range(3):
            with tqdm(total=2, desc="requests", leave=False, file=log) as inner:  # another library's
                inner.update(2)
            bar.update(1)
            tqdm.write("a line", file=log)
        bar.refresh()
    lines = log.getvalue().split("\n")
    assert "\x1b" not in log.getvalue()
    ours = [line for line in lines if line.startswith("evaluation")]
    assert len(ours) >= 2 and "3/3" in ours[-1] and not any("\r" in line for line in ours)
