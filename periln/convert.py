"""`periln convert` and `periln-convert`: the model family's converter, whose `--help` need not import torch."""

import argparse
import sys

from periln.family import part
from periln.runkit.errors import UsageError

_ARGUMENTS = part("convert_options")
parse = _ARGUMENTS["parse"]


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is read or downloaded."""
    if reason := _ARGUMENTS["refusal"](args):
        raise UsageError(reason)


def main(args: argparse.Namespace) -> int:
    """Convert; see `modeling_periln.convert.run`."""
    from modeling_periln.convert import run

    return run(args)


def command() -> int:
    """The entry point `periln-convert`."""
    from periln.start import start

    return start("convert", parse, check)


if __name__ == "__main__":
    sys.exit(command())
