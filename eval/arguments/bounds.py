"""Options of `python -m eval.bounds`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_data, check_least, check_model, check_new_folder, check_tokenizer
from periln.runkit.errors import make_parser, more_options


def parse(argv: list[str] | None = None, prog: str = "python -m eval.bounds") -> argparse.Namespace:
    parser = make_parser(
        prog, "Bound a model's gradients and residual steps, token by token.", "runs/NAME --out bounds/"
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="run folder (its newest checkpoint), checkpoint, or Hub id")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder; nothing is overwritten")
    add("--data", default="wikitext", help="wikitext, hf:NAME[:CONFIG[:SPLIT]], a file or folder of text, or random")
    add("--samples", type=int, default=32, help="samples")
    add("--tokens", type=int, default=128, help="tokens a sample")
    add = more_options(parser).add_argument
    add("--batch-size", type=int, default=4, help="samples a pass")
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's own")
    add("--revision", help="branch, tag or commit of a model of the Hub")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(args, samples=1, tokens=2, batch_size=1)
    check_new_folder(args.out, "--out")
    check_data(args.data)
    check_model(args.model)
    check_tokenizer(args.tokenizer)
