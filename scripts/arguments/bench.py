"""Options of `python -m scripts.bench`."""

import argparse
from pathlib import Path

from periln.runkit.errors import UsageError, make_parser


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.bench") -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        prog,
        "Measure speed and memory of PeriLlama against Transformers' models. The speed of evaluation is eval.bench; "
        "`periln bench` is the stability bench, eval.stability.",
        "--out bench/",
    )
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of bench.json and bench.md")
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="only these; all when left out (--list names them)")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs a case")
    parser.add_argument("--pairs-a-build", type=int, default=10, help="pairs until both models are built anew")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs=2,
        metavar=("BATCH", "SEQUENCE"),
        help="of the training steps, instead of each case's own; decoding, norms and memory stay as they are",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one, when left out")
    parser.add_argument("--again", action="store_true", help="measure what bench.json holds once more")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--peak-memory-of", choices=["ours", "llama"], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.pairs < 2:
        raise UsageError(f"--pairs {args.pairs} is too few for an interval: give at least 2 (30 for a result to quote)")
    if args.pairs_a_build < 1:
        raise UsageError(f"--pairs-a-build {args.pairs_a_build}: give at least 1")
    if args.tokens and (args.tokens[0] < 1 or args.tokens[1] < 2):
        given = " ".join(map(str, args.tokens))
        raise UsageError(f"--tokens {given}: a batch has at least 1 sequence, and that 2 tokens (one to predict)")
