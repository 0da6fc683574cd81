"""Rewrite a model so that it runs in FP16, the same function: `python -m eval.fp16 MODEL OUT`.

Two exact rewrites, by powers of two that are chosen from measured peaks: the stream's scale (embedding, output norms'
gains, epsilons), and the scale of a module's output before its output norm. `layout.py` says where factors can stand.
The written model loads with its stock class; it is loaded again and compared in FP32 before OUT appears.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging as transformers_logging

from eval.targets import Checkpoint, Model, find_measured
from eval.texts.samples import find_samples, read_data
from runkit.checkpoints import save_tokenizer
from runkit.environment import describe_environment
from runkit.errors import UsageError, make_parser, run_command
from runkit.folder import write_folder, write_json, write_text
from runkit.process import start_stage
from runkit.progress import progress_bar

from .cure import Wish, check_announced, cure, logits_of
from .layout import EPSILON_OF
from .table import as_markdown

TOKENS = 512  # a sample, where nothing else is asked for


def find_tokenizer(args: argparse.Namespace, model: Model) -> tuple[Any, str]:
    """What the peaks are measured on, and the tokenizer that reads it (None for random ids).

    Raises:
        UserError: text is asked for, and there is no tokenizer for it.
    """
    data = args.data or ("wikitext" if args.tokenizer or model.has_tokenizer else "random")
    if args.data is None and data == "random":
        print(f"{args.model} has no tokenizer: peaks are measured on random token ids", file=sys.stderr)
    return None if data == "random" else model.tokenizer(args.tokenizer, args.trust_remote_code), data


def load(checkpoint: Checkpoint, trusted: bool, device: str) -> PreTrainedModel:
    """The model in FP32, its stream as well: a stream's dtype belongs to a run."""
    model = checkpoint.load(torch.float32, device, trusted)
    if getattr(model.config, "residual_dtype", None) is not None:
        model.config.residual_dtype = None
    return model


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype that a configuration states; FP32 where it states none."""
    dtype = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def write_model(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> list[str]:
    """Weights in `dtype` where it holds them exactly, else in FP32 (names are given); configuration, tokenizer."""
    state, wide, tied = {}, [], set(getattr(model, "all_tied_weights_keys", ()))
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        narrow = tensor.to(dtype)
        exact = torch.equal(narrow.float(), tensor)
        state[name] = (narrow if exact else tensor).clone()
        if not exact:
            wide.append(name)
    model.save_pretrained(folder, state_dict=state)
    if model.config.model_type == "peri_llama":
        custom_object_save(model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        save_tokenizer(tokenizer, model.config, folder)
    return wide


def nothing_moved(record: dict[str, Any]) -> str:
    """Why a model stays as it is, with the peak that has the least headroom."""
    least = min(record["peaks"], key=lambda p: math.inf if p["headroom_bits"] is None else p["headroom_bits"])
    passes = "forward and backward pass are" if record["before"]["backward"] is None else "the forward pass is"
    left = f"the least headroom, {least['headroom_bits']:.1f} bits, is in {least['tensor']}"
    return f"in FP16 {passes} finite, and {left} (asked for: {record['wish']['margin']:g})"


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    _check(args)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source = find_measured(args.model, args.revision)
    checkpoint = source.chosen
    config, (tokenizer, data) = checkpoint.config(args.trust_remote_code), find_tokenizer(args, source)
    samples = find_samples(config, tokenizer, data, args.samples, args.tokens, args.seed, TOKENS)
    model, dtype = load(checkpoint, args.trust_remote_code, args.device), stored_dtype(config)
    batches = list(samples.batches(args.batch_size, args.device))
    wish = Wish(args.margin, args.loss_scale, args.backward, args.keep_eps, args.scale_sums, args.tolerance)
    with progress_bar(args, len(batches) + 2, "measuring", "batch") as bar:
        record, ids, reference = cure(model, batches, wish, bar.update)
    if not record["needed"]:
        print(f"nothing has to move: {nothing_moved(record)}; {args.out} was not written")
        return
    head = {"model": args.model, "weights_sha256": checkpoint.weights_sha256, "data": samples.described}
    with write_folder(args.out) as folder:
        own = source.tokenizer(None, args.trust_remote_code) if source.has_tokenizer else None
        wide = write_model(model.cpu(), own, folder, dtype)
        del model
        written = load(Checkpoint(0, folder), args.trust_remote_code, args.device)
        difference = check_announced(record, logits_of(written, ids), reference)
        more = {"written_difference": difference, "written_in_fp32": wide, "dtype": str(dtype).removeprefix("torch.")}
        record = head | record | more | {"environment": describe_environment(torch.device(args.device))}
        write_json(folder / "fp16_rewrite.json", record)
        write_text(folder / "fp16_rewrite.md", as_markdown(record))
    print(as_markdown(record, rows=12))
    print(f"written: {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UsageError(f"{args.out} exists: nothing is overwritten, give another OUT")
    for name, least in (("samples", 1), ("tokens", 2), ("batch_size", 1)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.margin <= 12:
        raise UsageError(f"--margin must be between 0 and 12 bits, not {args.margin:g}")
    for name in ("loss_scale", "tolerance"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}")
    if args.data not in (None, "wikitext", "random"):
        read_data(args.data)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda was asked for, but torch sees no CUDA device")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        "python -m eval.fp16", f"Make a model FP16-safe, the same function. For {', '.join(EPSILON_OF)}."
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, run folder (its newest checkpoint) or Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder; nothing is overwritten")
    parser.add_argument("--data", "--text", metavar="DATA", help="for the peaks: wikitext, hf:NAME, random, "
                        "or a file or folder of text; wikitext when left out (random without a tokenizer)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=64, help="samples")
    parser.add_argument("--tokens", "--context", type=int, metavar="N",
                        help=f"tokens a sample; {TOKENS}, or what the model takes, when left out")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="PATH_OR_ID", help="another tokenizer than the model's own")
    parser.add_argument("--batch-size", type=int, default=4, help="samples a batch")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples")
    parser.add_argument("--margin", type=float, default=2.0, metavar="BITS", help="bits between peaks and 65504")
    parser.add_argument("--loss-scale", type=float, default=1.0, help="of the backward pass that must stay finite")
    backward = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--backward", help="look at gradients too", **backward)
    parser.add_argument(
        "--keep-eps", action="store_true", help="leave the one epsilon of a family without slots as it is"
    )
    parser.add_argument(
        "--scale-sums", action="store_true", help="where norms stand on the stream: a factor for each sum"
    )
    parser.add_argument(
        "--tolerance", type=float, default=1e-2, help="largest difference of logits, of the largest logit"
    )
    parser.add_argument("--revision", help="of a Hub id: branch, tag or commit")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that the model's repository carries")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", file=sys.stderr)
    arguments = parse()
    sys.exit(run_command(main, arguments))
