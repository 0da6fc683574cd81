"""The sections by name. Each takes the place and its notes."""

from collections.abc import Callable
from pathlib import Path

import torch

from periln.scripts.gpu_check.arithmetic import check_arithmetic
from periln.scripts.gpu_check.decoding import check_decoding
from periln.scripts.gpu_check.kernels import check_kernels
from periln.scripts.gpu_check.machine import check_device
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.overflow import check_overflow
from periln.scripts.gpu_check.place import Place
from periln.scripts.gpu_check.resume import check_resume
from periln.scripts.gpu_check.speed import check_speed
from periln.scripts.training.engine import pick_device

FUNCTIONS: dict[str, Callable[[Place, Notes], None]] = {
    "device": check_device,
    "arithmetic": check_arithmetic,
    "speed": check_speed,
    "kernels": check_kernels,
    "decoding": check_decoding,
    "resume": check_resume,
    "overflow": check_overflow,
}


def place_of(out: Path, device: str | None) -> Place:
    """The folder and the device: a GPU where there is one.

    Raises:
        UsageError: `cuda` where torch sees none.
    """
    return Place(out, torch.device(pick_device(device or "auto")))
