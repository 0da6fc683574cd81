"""Progress bars, one line for each process that runs beside another."""

import argparse
import sys
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0


def progress_bar(
    args: argparse.Namespace, total: int | None, desc: str, unit: str, shown: bool = True, **more: Any
) -> tqdm:
    """A bar on the line that `--bar` names, with an estimate of the time left; `more` goes to tqdm.

    Where no one watches (a log file) it says where it is every 30 seconds only: a week of ten lines a second would
    fill a disk.
    """
    options = {"smoothing": 0.05, "dynamic_ncols": True, "position": args.bar, "disable": not shown}
    if not sys.stderr.isatty():
        options |= {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS}
    return tqdm(total=total, desc=desc, unit=unit, **options, **more)
