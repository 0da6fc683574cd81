"""The converter's command line. It imports nothing of ours, so that `periln convert --help` need not import torch."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

TARGETS = (
    *("llama", "olmo2", "hyperclovax", "glm4", "mistral", "qwen3", "olmo3", "exaone4", "gemma3_text", "bitnet"),
    "peri_llama",
)
WIKITEXT, NO_TEXT = "wikitext", "none"
# What `wikitext` names everywhere: data set, configuration, split. Its lines, joined, are the text.
WIKITEXT_2 = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse(argv: Sequence[str] | None = None, prog: str = "periln-convert") -> argparse.Namespace:
    """The command line's arguments: for a conversion, or with `--refresh-code` for refreshing checkpoints."""
    words = sys.argv[1:] if argv is None else argv
    if "--refresh-code" in words:
        about = "Replace the code in PeriLlama checkpoints by this package's; in adapters, the path of a moved base."
        about += f"\n\nexample:\n  {prog} --refresh-code runs/NAME/checkpoints/step_00000120"
        parser = _Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--refresh-code", required=True, nargs="+", type=Path, metavar="CHECKPOINT", help="folders")
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return parser.parse_args(words)
    about = "Convert a checkpoint between PeriLlama and a stock class, without changing the function."
    about += f"\n\nexamples:\n  {prog} runs/NAME exported --to llama\n  {prog} --refresh-code CHECKPOINT"
    more = "--refresh-code has its own help: --refresh-code --help"
    parser = _Parser(prog=prog, description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(refresh_code=None)
    parser.add_argument("src", metavar="SRC", help="model, run or adapter folder, or Hub id")
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder; must not exist, or be empty")
    parser.add_argument("--to", required=True, choices=TARGETS, help="architecture of DST")
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit (default: main)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: %(default)s)")
    text = (
        "compare on this text too: a file, wikitext, or none (default: wikitext, if the Hub has it and can be reached)"
    )
    parser.add_argument("--text", metavar="FILE", help=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(words)


def refusal(args: argparse.Namespace) -> str | None:
    """Why these arguments are refused before anything is read or downloaded; None if they are not."""
    if args.refresh_code:
        return None
    if args.text not in (None, WIKITEXT, NO_TEXT) and not Path(args.text).is_file():
        return f"--text {args.text} is not a file; give one, or {WIKITEXT}, or {NO_TEXT}"
    if args.dst.exists() and (not args.dst.is_dir() or any(args.dst.iterdir())):
        return f"{args.dst} exists and is not an empty folder: nothing is overwritten"
    return None
