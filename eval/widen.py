"""Widen a GGUF file to a model folder that every stage reads: `python -m eval.widen FILE.gguf OUT`.

The weights keep the rounding of their quantization, in FP32. The folder has Transformers' own class of the
architecture, weights in safetensors, and the tokenizer of the file.
"""

import sys

from periln.eval.arguments.widen import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("eval.widen", parse, check))  # parses before the imports below, which take seconds

import argparse
import copy
import importlib.util

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from periln.runkit.errors import UserError
from periln.runkit.folder import check_room, write_folder
from periln.runkit.models import not_loaded
from periln.runkit.process import quiet_transformers, start_stage
from periln.verbs import install_line

WIDER = 8  # how many times as large an FP32 weight can be as a quantized one of 4 bits


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"GGUF is read with the package gguf: {install_line('gguf')}")
    check_room(args.out, WIDER * args.file.stat().st_size, "the widened model (at most)")
    quiet_transformers()
    where = {"pretrained_model_name_or_path": args.file.resolve().parent, "gguf_file": args.file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # an architecture or a format that Transformers does not read fails in many ways
        raise not_loaded(args.file, error) from error
    config = copy.deepcopy(read.config)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, name):
            delattr(config, name)
    with torch.device("meta"):
        model = type(read)(config)
    # A model that was read from GGUF does not save itself: its weights move to a new one of the same class.
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    with write_folder(args.out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    count = sum(p.numel() for p in model.parameters())
    print(f"written: {args.out} ({type(model).__name__}, {count:,} parameters, quantized weights in FP32)")
