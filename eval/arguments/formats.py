"""Options of `python -m eval.formats`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import TOKENS, check_data, check_folder, check_least, check_model, check_tokenizer
from periln.eval.formats.recipes import GROUPS, ROWS, chosen
from periln.runkit.errors import UsageError, did_you_mean, make_parser, more_options

QUICK, FULL = 16, 128  # samples, where no number is given
FORMATS = tuple(dict.fromkeys(cell.format for row in ROWS for cell in row.cells.values()))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def parse(argv: list[str] | None = None, prog: str = "python -m eval.formats") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Measure which number formats a causal LM survives, by emulation in FP32: numerics, never speed.",
        "google/gemma-3-270m",
        "runs/NAME --targets stream,kv --formats FP16,INT8",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, run folder (its newest checkpoint) or Hub id")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"the usual formats on {QUICK} samples (the default)")
    size.add_argument("--full", action="store_true", help=f"every format and scaling on {FULL} samples")
    add("--targets", type=_names, metavar="A,B", help=f"of {', '.join(GROUPS)}; all when left out")
    add("--formats", type=_names, metavar="A,B", help=f"only rows with one of {', '.join(FORMATS)}")
    add("--cure", action="store_true", help="measure plain casts once more after the FP16 rewrite of `periln cure`")
    add("--data", help="wikitext, hf:NAME[:CONFIG[:SPLIT]], a file or folder of text, or random; wikitext when left "
        "out (random without a tokenizer)")  # fmt: skip
    add("--samples", type=int, help="samples of text")
    add("--tokens", type=int, metavar="N", help=f"tokens a sample; {TOKENS}, or what the model takes, when left out")
    add("--out", type=Path, metavar="DIR", help="folder of the results; the run's eval/formats, or ./formats/NAME, "
        "when left out; rows of the same model and samples that it holds are kept")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    add = more_options(parser).add_argument
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--batch-size", type=int, help="samples a pass; as many as keep the logits small when left out")
    add("--revision", help="branch, tag or commit of a model of the Hub")
    add("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's own")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(args, samples=1, tokens=2, batch_size=1)
    for flag, given, known in (("--targets", args.targets, GROUPS), ("--formats", args.formats, FORMATS)):
        for name in given or ():
            if name not in known:
                near = did_you_mean(name, list(known))
                raise UsageError(f"{flag} has no {name!r}{near}: it has {', '.join(known)}")
    if not chosen(args.full, args.targets or GROUPS, args.formats or ()):
        more = "" if args.full else " in the quick table (--full has more)"
        raise UsageError(f"no row has {', '.join(args.formats)} for {', '.join(args.targets or GROUPS)}{more}")
    if args.data is not None:
        check_data(args.data)
    check_model(args.model)
    check_tokenizer(args.tokenizer)
    if args.out is not None:
        check_folder(args.out)
        check_records(args.out)


def check_records(folder: Path) -> None:
    """Refuse a folder that holds something else than records of this command."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "formats.json").exists():
        raise UsageError(f"{folder} holds something else than measured formats: give another --out")
