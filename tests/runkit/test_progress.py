"""Progress bars: lively at a terminal, seldom in a log."""

import io
import sys
from argparse import Namespace

from runkit.progress import progress_bar


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
