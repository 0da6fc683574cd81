"""Options of `python -m eval.loss`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import add_model_options, batch_size, check_least
from periln.eval.texts.documents import KNOWN
from periln.runkit.errors import UsageError, make_parser, more_options

CONTEXT = 2048  # tokens a window, if the model has that many positions


def parse(argv: list[str] | None = None, prog: str = "python -m eval.loss") -> argparse.Namespace:
    parser = make_parser(
        prog, "Measure the loss on random documents, C4's unless told otherwise.", "runs/NAME --dataset wikitext-pages"
    )
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="run folders, checkpoints or ids of the Hub")
    parser.add_argument("--dataset", default="c4", help=f"{', '.join(KNOWN)}, or a data set's id on the Hub")
    parser.add_argument("--documents", type=int, default=10_000, help="how many, chosen at random")
    more = more_options(parser)
    add_model_options(parser, more)
    more.add_argument("--config", help="configuration of the data set; en for C4")
    more.add_argument("--split", help="split of the data set; validation when left out (wikitext-pages: test)")
    more.add_argument("--column", help="column of the texts; text when left out (wikitext-pages: page)")
    more.add_argument("--dataset-revision", metavar="COMMIT", help="of the data set; its newest when left out")
    more.add_argument("--seed", type=int, default=0, help="of that choice")
    more.add_argument("--sample", type=Path, metavar="FILE", help="keep the documents there, or take them from there")
    more.add_argument("--packed", action="store_true", help="read over the documents' ends; else each by itself")
    more.add_argument("--context", type=int, help=f"tokens a window; when left out the model's, at most {CONTEXT}")
    more.add_argument("--batch-size", default="8", help="windows a batch, or auto: as many as the memory holds")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(args, documents=1, context=1)
    if args.dataset == "wikitext":
        raise UsageError(
            "--dataset wikitext: that name is for the lines that --data reads; its articles are wikitext-pages"
        )
    if isinstance(size := batch_size(args.batch_size), int) and size < 1:
        raise UsageError(f"--batch-size must be at least 1, or auto, not {size}")
