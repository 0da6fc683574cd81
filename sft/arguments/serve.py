"""Options of `python -m sft.serve`: those of `transformers serve`."""

import argparse
import sys

from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m sft.serve") -> argparse.Namespace:
    """Every word is handed on to `transformers serve`; `--debug` is read here as well."""
    words = sys.argv[1:] if argv is None else argv
    if words in (["-h"], ["--help"]):
        parser = make_parser(
            prog,
            "Serve a fine-tuned checkpoint with `transformers serve`.",
            "runs/NAME/sft/checkpoints/step_00000120 --port 8000",
        )
        parser.usage = f"{prog} CHECKPOINT [OPTION ...]"
        parser.epilog = "All other options are those of `transformers serve`: `transformers serve --help` lists them."
        parser.parse_args(words)
    return argparse.Namespace(words=[word for word in words if word != "--debug"], debug="--debug" in words)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError where no checkpoint is named."""
    if not args.words:
        raise UsageError("name a checkpoint to serve")
