"""Options of `python -m eval.stability`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import TOKENS, check_data, check_folder, check_least, check_model, check_tokenizer
from periln.runkit.errors import UsageError, make_parser, more_options

DTYPES = ("float32", "bfloat16", "float16")
# How many samples each part has by default.
FULL = {"samples": 1000, "backward_samples": 32, "skip_samples": 16, "fp16_samples": 4}
QUICK = {"samples": 16, "backward_samples": 1, "skip_samples": 1, "fp16_samples": 1}
QUICK_SKIP_TOKENS = 128  # of the sample on which layers are skipped


def parse(argv: list[str] | None = None, prog: str = "python -m eval.stability") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Measure what the norm placement does to the layers of causal LMs, and how near FP16's limit they are.",
        "google/gemma-3-270m",
        "runs/NAME --samples 100",
        "--explain runs/NAME",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="run folders (all their checkpoints), checkpoints, or Hub ids")
    add("--explain", type=Path, metavar="RUN", help="only tell what happened in a run, from its records")
    add("--data", default="wikitext", help="wikitext, hf:NAME[:CONFIG[:SPLIT]], a file or folder of text, or random")
    add("--quick", action=argparse.BooleanOptionalAction, default=None,
        help=f"{QUICK['samples']} samples instead of {FULL['samples']}, and fewer in the other parts; the default "
        "where no run is given")  # fmt: skip
    add("--samples", type=int, help=f"samples for the forward pass; {_counts('samples')}")
    add("--tokens", type=int, metavar="N", help=f"tokens a sample; {TOKENS}, or what the model takes, when left out")
    add("--out", type=Path, metavar="DIR", help="results in DIR/NAME; when left out, ./stability for what is not a run")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    add("--last", action="store_true", help="of a run the last checkpoint alone, and none of one that has diverged")
    add("--again", action="store_true", help="measure again what has been measured")
    add = more_options(parser).add_argument
    add("--seed", type=int, default=0, help="which samples are drawn")
    add("--batch-size", type=int, default=4, help="samples a forward pass")
    add("--angles", default="all", metavar="all|N", help="angular distance of all pairs of layers, or of l and l + N")
    add("--backward-samples", type=int, help=f"samples for gradients; 0: none; {_counts('backward_samples')}")
    add("--skip-samples", type=int,
        help=f"samples for the loss without each layer; 0: not measured; {_counts('skip_samples')}")  # fmt: skip
    add(
        "--skip-tokens",
        type=int,
        metavar="N",
        help=f"the first tokens of each of those samples; all, or {QUICK_SKIP_TOKENS} with --quick, when left out",
    )
    add("--fp16-samples", type=int,
        help=f"samples that run in FP16, the hardest first; 0: none; {_counts('fp16_samples')}")  # fmt: skip
    add("--loss-scale", type=float, default=1.0, help="of the backward pass in FP16")
    add("--no-certificate", action="store_true", help="leave out the bounds from weights alone")
    add("--dtype", default="float32", choices=DTYPES, help="the model's precision while measured")
    add("--revision", help="branch, tag or commit of a model of the Hub")
    add("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's own")
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    args = parser.parse_args(argv)
    if args.quick is None:
        args.quick = not any(_of_a_run(Path(model)) for model in args.models)
    if args.quick and args.skip_samples is None and args.skip_tokens is None:
        args.skip_tokens = QUICK_SKIP_TOKENS
    for name, count in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, count)
    return args


def _counts(name: str) -> str:
    return f"{FULL[name]}, or {QUICK[name]} with --quick, when left out"


def _of_a_run(path: Path) -> bool:
    """A run folder or one of its checkpoints."""
    return any((folder / "recipe.yaml").exists() for folder in (path, path.resolve().parent.parent))


def left_out(args: argparse.Namespace) -> str:
    """What a quick measurement leaves out, in a sentence; empty where it leaves out nothing."""
    words = {
        "samples": "samples",
        "backward_samples": "samples for gradients",
        "skip_samples": "samples for the loss without each layer",
        "fp16_samples": "samples in FP16",
    }
    less = [f"{getattr(args, n)} of {FULL[n]} {words[n]}" for n in FULL if getattr(args, n) < FULL[n]]
    if not args.quick or not less:
        return ""
    return (
        f"--quick measures on {', '.join(less)}: rarer peaks are missed, and averages are rougher (--no-quick for all)"
    )


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_least(
        args, samples=1, batch_size=1, backward_samples=0, skip_samples=0, fp16_samples=0, tokens=2, skip_tokens=2
    )
    if not args.loss_scale > 0:
        raise UsageError(f"--loss-scale must be positive, not {args.loss_scale:g}")
    if args.angles != "all" and not (args.angles.isdigit() and int(args.angles) > 0):
        raise UsageError(f"--angles must be all or a number of layers, not {args.angles!r}")
    if not args.models and args.explain is None:
        raise UsageError("name at least one run folder, checkpoint or Hub id")
    if args.models and args.explain is not None:
        raise UsageError("--explain reads a run's records alone: leave the models out")
    check_data(args.data)
    for model in args.models:
        check_model(model)
    check_tokenizer(args.tokenizer)
    if args.out is not None:
        check_folder(args.out)
