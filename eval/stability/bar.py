"""The bar of a plan: it announces what to expect, and moves in every part."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from periln.eval.stability.plan import STEPS, Plan
from periln.runkit.progress import progress_bar

SHAPE = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


@contextmanager
def plan_bar(args: argparse.Namespace, name: str) -> Iterator[Callable[[Plan], None]]:
    """Yields what a plan reports to while the bar is open."""
    told = False
    with progress_bar(args, STEPS, name, "step", bar_format=SHAPE) as bar:

        def tell(plan: Plan) -> None:
            nonlocal told
            if not told:
                tqdm.write(f"{name}: {plan.said()}", file=sys.stderr)
                told = True
            bar.set_description(f"{name}, {plan.part}" if plan.part else name, refresh=False)
            bar.update(int(STEPS * plan.share) - bar.n)

        yield tell
