"""Options of `python -m eval.retrofit`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import (
    check_data,
    check_least,
    check_model,
    check_new_folder,
    check_tokenizer,
    task_names,
)
from periln.eval.formats.recipes import ROWS
from periln.runkit.errors import UsageError, did_you_mean, make_parser, more_options

NONE = "none"
USUAL = (
    "weights: INT4 per row",
    "activations: FP8 E4M3 per tensor",
    "activations: INT8 per tensor",
    "stream: FP16",
    "recipes: MXFP4 W4A4",
)


def _rows(text: str) -> list[str]:
    return [] if text == NONE else [name.strip() for name in text.split(",") if name.strip()]


def parse(argv: list[str] | None = None, prog: str = "python -m eval.retrofit") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Report what a retrofit costs and gives: loss, divergence, headroom, massive activations and formats.",
        "org/name model-peri --out report",
        "runs/NAME model-peri runs/model-peri-gains runs/model-peri-healed --data my_texts/ --out report",
        "org/name model-peri --tasks hub --limit 200 --out report",
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="the model that was retrofitted: a model folder, a run folder or a Hub id")
    add("models", nargs="+", metavar="MODEL", help="what became of it, in order: after calibration, after healing, ...")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the report; nothing is overwritten")
    add("--data", default="wikitext", help="held-out text: wikitext, hf:NAME[:CONFIG[:SPLIT]], a file or folder of "
        "text, or random")  # fmt: skip
    add("--samples", type=int, default=16, help="samples of text")
    add("--tokens", type=int, metavar="N", help="tokens a sample; 256, or what the model takes, when left out")
    add("--rows", type=_rows, default=list(USUAL), metavar="A,B", help=f"rows of periln formats to emulate, or {NONE}")
    add("--tasks", metavar="A,B,...", help="tasks of lm-eval too: hub (the paper's five), mini, or their names")
    add("--limit", type=float, help="items a task, or a share of them below 1; all when left out")
    add = more_options(parser).add_argument
    add("--batch-size", type=int, default=1, help="samples a pass")
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the source's own")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(args, samples=1, tokens=2, batch_size=1, seed=0)
    known = [row.key for row in ROWS]
    for name in args.rows:
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"--rows has no {name!r}{near}: it has such as {', '.join(USUAL)}")
    if args.tasks is not None:
        task_names(args.tasks)
    elif args.limit is not None:
        raise UsageError("--limit is of --tasks, which was left out")
    check_data(args.data)
    for asked in (args.source, *args.models):
        check_model(asked)
    check_tokenizer(args.tokenizer)
    check_new_folder(args.out, "--out")
