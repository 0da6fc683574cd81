"""Options of `python -m scripts.prepare_data`."""

import argparse
import os
from pathlib import Path

from periln.runkit.errors import UsageError, did_you_mean, make_parser, more_options
from periln.scripts.data.sources import BPE, HUB, INSTALLED, MACHINE

CL100K = "cl100k_base"
DEFAULT_SOURCE = HUB + "mlfoundations/dclm-baseline-1.0"
SAVE_SECONDS = 20.0


def whole_number(text: str) -> int:
    """A whole number, 8e9 and 2**27 included."""
    base, power = text.split("**") if "**" in text else (text, "1")
    number = float(base) ** int(power)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def parse(argv: list[str] | None = None, prog: str = "python -m scripts.prepare_data") -> argparse.Namespace:
    parser = make_parser(
        prog,
        "Turn text into a tokenizer and token shards, the data of a pretraining.",
        "--source my_texts/ --out data/mine",
        "--source hf:mlfoundations/dclm-baseline-1.0 --tokenizer cl100k_base --max-tokens 31e9 --out data/dclm-cl100k",
        "--verify --out data/mine",
    )
    add = parser.add_argument
    add(
        "--source",
        default=DEFAULT_SOURCE,
        help=f"'{INSTALLED}', '{MACHINE}', a file or folder of text, or {HUB}DATASET",
    )
    add("--out", type=Path, required=True, help="data folder to write")
    add("--tokenizer", default=BPE, help=f"'{BPE}' (trained on the text), {CL100K}, a folder or Hub id")
    add("--vocab-size", type=whole_number, help=f"entries of the {BPE} (default there: 2048)")
    add("--max-tokens", type=whole_number, help="end with the document that reaches this many tokens, such as 8e9")
    add("--verify", action="store_true", help="only compare the shards in --out with the hashes in their index")
    add = more_options(parser).add_argument
    add("--dataset-config", help="configuration of the Hub dataset")
    add("--split", default="train", help="split of the Hub dataset")
    add("--revision", help="commit, tag or branch of the Hub dataset")
    add("--text-column", default="text", help="where the text is, in .jsonl, .parquet and datasets")
    add("--tokenizer-revision", help="commit, tag or branch of a Hub tokenizer")
    add("--tiktoken-file", help="rank file (.tiktoken), instead of the one that tiktoken loads")
    add("--sample-bytes", type=whole_number, default=1 << 26, help=f"text from which the {BPE} is trained")
    add("--context", type=whole_number, help="the tokenizer's model_max_length (512 for the BPE)")
    add("--max-bytes", type=whole_number, help=f"read at most this much text (8 MB of {INSTALLED})")
    add("--heldout-share", type=float, default=0.02, help="share of documents held out")
    add("--heldout-documents", type=whole_number, help="hold out at most this many documents")
    add("--max-document-bytes", type=whole_number, help="skip longer documents")
    add("--shard-tokens", type=whole_number, default=1 << 27, help="tokens in a shard")
    add("--workers", type=int, help="tokenizing processes; one for each core when left out")
    add("--save-seconds", type=float, default=SAVE_SECONDS, help="a kill costs at most this much work")
    args = parser.parse_args(argv)
    if args.workers is None:
        args.workers = len(os.sched_getaffinity(0))
    return args


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for what can be refused before anything is loaded."""
    if args.verify:
        return
    near = did_you_mean(args.tokenizer, [BPE, CL100K])
    if args.tokenizer not in (BPE, CL100K) and "/" not in args.tokenizer and near and not Path(args.tokenizer).exists():
        raise UsageError(f"unknown tokenizer {args.tokenizer!r}{near}")
    if args.tokenizer != BPE and args.vocab_size is not None:
        raise UsageError(f"vocab_size belongs to the tokenizer {BPE}; {args.tokenizer} has its own")
    if args.workers < 1:
        raise UsageError(f"--workers must be at least 1, not {args.workers}")
    if args.tiktoken_file is not None and not Path(args.tiktoken_file).is_file():
        raise UsageError(f"--tiktoken-file {args.tiktoken_file} is not a file")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is not a folder")
