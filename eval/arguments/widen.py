"""Options of `python -m eval.widen`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_new_folder
from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m eval.widen") -> argparse.Namespace:
    about = "Widen a GGUF file to a model folder: its quantized weights, in FP32."
    parser = make_parser(prog, about, "model-Q4_0.gguf model-fp32/")
    parser.add_argument("file", metavar="FILE.gguf", type=Path, help="a file that Transformers can read")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder; nothing is overwritten")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_new_folder(args.out, "OUT")
    if not args.file.is_file():
        raise UsageError(f"{args.file} is not a file")
    with open(args.file, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UsageError(f"{args.file} is not a GGUF file")
