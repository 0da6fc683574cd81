"""Rewrite a model so that it runs in FP16, the same function: `python -m eval.fp16 MODEL OUT`.

Two exact rewrites, by powers of two that are chosen from measured peaks: the stream's scale (embedding, output norms'
gains, epsilons), and the scale of a module's output before its output norm. `layout.py` says where factors can go.
The written model loads with its stock class; it is loaded again and compared in FP32 before OUT appears.
"""

import sys

from periln.eval.arguments.fp16 import TOKENS, check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.fp16", parse, check))  # parses before the imports below, which take seconds

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

from periln.eval.fp16.cure import Wish, check_announced, cure, logits_of
from periln.eval.fp16.table import as_markdown
from periln.eval.stability.bar import plan_bar
from periln.eval.targets import Checkpoint, Model, find_measured
from periln.eval.texts.samples import find_samples
from periln.runkit.checkpoints import save_tokenizer
from periln.runkit.encoding import unchanged
from periln.runkit.environment import describe_environment
from periln.runkit.folder import check_room, write_folder, write_json, write_text
from periln.runkit.process import need_device, quiet_transformers, start_stage


def find_tokenizer(args: argparse.Namespace, model: Model) -> tuple[Any, str]:
    """The data for the peaks, and its tokenizer (None for random ids).

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
    """Weights in `dtype` where that is exact, else in FP32 (their names are returned); configuration, tokenizer."""
    state, wide, tied = {}, [], set(getattr(model, "all_tied_weights_keys", ()))
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        narrow = tensor.to(dtype)
        exact = narrow is tensor or torch.equal(narrow.to(tensor.dtype), tensor)
        state[name] = narrow if exact else tensor
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
    """Why a model stays unchanged, with the peak of least headroom."""
    least = min(record["peaks"], key=lambda p: math.inf if p["headroom_bits"] is None else p["headroom_bits"])
    passes = "forward and backward pass are" if record["before"]["backward"] is None else "the forward pass is"
    left = f"the least headroom, {least['headroom_bits']:.1f} bits, is in {least['tensor']}"
    return f"in FP16 {passes} finite, and {left} (asked for: {record['wish']['margin']:g})"


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", file=sys.stderr)
    check(args)
    need_device(args.device, "--device cuda")
    quiet_transformers()
    source = find_measured(args.model, args.revision)
    checkpoint = source.chosen
    weights = sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors"))
    check_room(args.out, weights, "the rewritten copy")
    config, (tokenizer, data) = checkpoint.config(args.trust_remote_code), find_tokenizer(args, source)
    with unchanged(tokenizer):
        samples = find_samples(config, tokenizer, data, args.samples, args.tokens, args.seed, TOKENS)
    model, dtype = load(checkpoint, args.trust_remote_code, args.device), stored_dtype(config)
    batches = list(samples.batches(args.batch_size, args.device))
    gradients, half = -(-args.backward_samples // args.batch_size), args.fp16_samples
    wish = Wish(
        args.margin, args.loss_scale, args.backward, args.keep_eps, args.scale_sums, args.tolerance, gradients, half
    )
    with plan_bar(args, args.model) as tell:
        record, ids, reference = cure(model, batches, wish, tell)
    if not record["needed"]:
        print(f"nothing has to move: {nothing_moved(record)}; {args.out} was not written")
        return
    head = {"model": args.model, "weights_sha256": checkpoint.weights_sha256, "data": samples.described}
    with write_folder(args.out) as folder:
        if args.tokenizer is not None or tokenizer is None:  # else it is the model's own: loading one takes seconds
            tokenizer = source.tokenizer(None, args.trust_remote_code) if source.has_tokenizer else None
        wide = write_model(model.cpu(), tokenizer, folder, dtype)
        del model
        written = load(Checkpoint(0, folder), args.trust_remote_code, args.device)
        difference = check_announced(record, logits_of(written, ids), reference)
        more = {"written_difference": difference, "written_in_fp32": wide, "dtype": str(dtype).removeprefix("torch.")}
        record = head | record | more | {"environment": describe_environment(torch.device(args.device))}
        write_json(folder / "fp16_rewrite.json", record)
        write_text(folder / "fp16_rewrite.md", as_markdown(record))
    print(as_markdown(record, rows=12))
    print(f"written: {args.out}")
