"""Progress bars, one line for each process that runs beside another."""

import argparse

from tqdm import tqdm


def progress_bar(args: argparse.Namespace, total: int, desc: str, unit: str, shown: bool = True) -> tqdm:
    """A bar on the line that `--bar` names, with an estimate of the time left."""
    options = {"smoothing": 0.05, "dynamic_ncols": True, "position": args.bar, "disable": not shown}
    return tqdm(total=total, desc=desc, unit=unit, **options)
