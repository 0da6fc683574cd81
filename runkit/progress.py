"""Progress bars, one line for each process that runs beside another."""

import argparse

from tqdm import tqdm


def progress_bar(args: argparse.Namespace, total: int, desc: str, unit: str) -> tqdm:
    """A bar on the line that `--bar` names, with an estimate of the time left."""
    return tqdm(total=total, desc=desc, unit=unit, smoothing=0.05, dynamic_ncols=True, position=args.bar)
