"""Options of `python -m eval.fp16`."""

import argparse
from pathlib import Path

from periln.eval.arguments.shared import check_data, check_least, check_model, check_new_folder, check_tokenizer
from periln.eval.fp16.families import EPSILON_OF
from periln.runkit.errors import UsageError, make_parser, more_options
from periln.runkit.number_format import FP16

TOKENS = 256  # a sample, by default


def parse(argv: list[str] | None = None, prog: str = "python -m eval.fp16") -> argparse.Namespace:
    parser = make_parser(
        prog,
        f"Rewrite a model so that it runs in FP16, the same function. For {', '.join(EPSILON_OF)}.",
        "google/gemma-3-270m gemma-fp16",
        "runs/NAME cured --data my_texts/",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="model folder, run folder (its newest checkpoint) or Hub id")
    add("out", metavar="OUT", type=Path, help="new folder; nothing is overwritten")
    add("--data", "--text", metavar="DATA", help="for the peaks: wikitext, hf:NAME, random, "
                        "or a file or folder of text; wikitext when left out (random without a tokenizer)")  # fmt: skip
    add("--samples", type=int, default=8, help="samples for the peaks")
    add("--tokens", "--context", type=int, metavar="N",
                        help=f"tokens a sample; {TOKENS}, or what the model takes, when left out")  # fmt: skip
    add("--device", default="cpu", choices=("cpu", "cuda"), help="where to run it")
    add = more_options(parser).add_argument
    add("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's own")
    add("--batch-size", type=int, default=2, help="samples a batch")
    add("--backward-samples", type=int, default=2, help="the first of them, for gradients")
    add("--fp16-samples", type=int, default=1, help="samples that run in FP16, the hardest first")
    add("--seed", type=int, default=0, help="of the choice of samples")
    add("--margin", type=float, default=2.0, metavar="BITS", help=f"bits between peaks and {FP16.limit}")
    add("--loss-scale", type=float, default=1.0, help="of the backward pass that must stay finite")
    add("--backward", action=argparse.BooleanOptionalAction, default=True, help="look at gradients too")
    add("--keep-eps", action="store_true", help="leave the one epsilon of a family without slots as it is")
    add("--scale-sums", action="store_true", help="where norms are on the stream: a factor for each sum")
    add("--tolerance", type=float, default=1e-2, help="largest difference of logits, of the largest logit")
    add("--revision", help="of a Hub id: branch, tag or commit")
    add("--trust-remote-code", action="store_true", help="run code that the model's repository carries")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    check_new_folder(args.out, "OUT")
    check_least(args, samples=1, tokens=2, batch_size=1, backward_samples=1, fp16_samples=1)
    if not 0 <= args.margin <= 12:
        raise UsageError(f"--margin must be between 0 and 12 bits, not {args.margin:g}")
    for name in ("loss_scale", "tolerance"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.data is not None:
        check_data(args.data)
    check_model(args.model)
    check_tokenizer(args.tokenizer)
