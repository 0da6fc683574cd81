"""The settings of a score and the device, from options that several commands share."""

import argparse

import torch

from periln.eval.arguments.shared import batch_size
from periln.eval.scoring.harness import Settings
from periln.runkit.errors import UsageError
from periln.runkit.process import need_device


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the flags ask for, checked."""
    size, device = batch_size(args.batch_size), device_of(args.device)
    settings = Settings(args.num_fewshot, args.limit, size, args.dtype, device, args.scoring)
    settings.check()
    return settings


def device_of(name: str) -> str:
    """The device of that name, or for `auto` a GPU where torch sees one.

    Raises:
        UsageError: a device that is not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise UsageError(f"--device {name} is not a device: use cpu, cuda or cuda:1") from None
    need_device(kind, f"--device {name}")
    return name
