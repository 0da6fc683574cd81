"""Options of `python -m sft.serve`: those of `transformers serve`."""

import argparse
import sys
from pathlib import Path

from runkit.errors import UsageError, UserError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m sft.serve") -> argparse.Namespace:
    """Every word is handed on to `transformers serve`; `--debug` is read here as well."""
    words = sys.argv[1:] if argv is None else argv
    if words in (["-h"], ["--help"]):
        parser = make_parser(prog, "Serve a fine-tuned checkpoint with `transformers serve`.")
        parser.usage = f"{prog} CHECKPOINT [OPTION ...]"
        parser.epilog = "All other options are those of `transformers serve`: `transformers serve --help` lists them."
        parser.parse_args(words)
    return argparse.Namespace(words=[word for word in words if word != "--debug"], debug="--debug" in words)


def check(args: argparse.Namespace) -> None:
    """Refuse no checkpoint at all (UsageError), and a folder without tokenizer or chat template (UserError)."""
    if not args.words:
        raise UsageError("name a checkpoint to serve")
    folder = None if args.words[0].startswith("-") else Path(args.words[0])
    if folder is None or not folder.is_dir():
        return
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is no checkpoint (config.json): name one of those in its checkpoints/")
    if not (folder / "chat_template.jinja").exists():
        raise UserError(f"{folder} has no chat template (chat_template.jinja): serve a fine-tuned checkpoint")
