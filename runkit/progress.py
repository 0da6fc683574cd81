"""Progress bars at a terminal, one line for each of several processes; lines of text in a log."""

import argparse
import sys
from collections.abc import Callable
from typing import Any, TextIO
from weakref import WeakSet

from tqdm import tqdm

LOG_SECONDS = 30.0


class LogBar(tqdm):
    """A bar for a file: each time it shows itself it adds a line, and it moves no cursor."""

    # A separate instance, so that another library's bar and `tqdm.write` do not treat it as a line to work around.
    _instances: WeakSet[Any] = WeakSet()
    monitor = None

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def show(text: str) -> None:
            if text.strip():
                file.write(f"{text.rstrip()}\n")
                file.flush()

        return show

    def moveto(self, n: int) -> None:
        """A file has no cursor."""


def progress_bar(
    args: argparse.Namespace, total: int | None, desc: str, unit: str, shown: bool = True, **more: Any
) -> tqdm:
    """A bar on the line that `--bar` names, with the estimated time left; `more` goes to tqdm.

    In a log file it reports only every 30 seconds, in a line without control characters:
    a week of ten lines a second would fill a disk.
    """
    options: dict[str, Any] = {"smoothing": 0.05, "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(total=total, desc=desc, unit=unit, position=args.bar, dynamic_ncols=True, **options, **more)
    options |= {"position": 0, "mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "ncols": 100}
    return LogBar(total=total, desc=desc, unit=unit, **options, **more)
