"""The rates that a device reaches, measured."""

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(device: torch.device, work: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of some calls, after one that does not count."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    times = []
    for _ in range(repeats):
        finish()
        start = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - start)
    return min(times)


def attainable_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; on a CPU in FP32, whose rate the emulated FP16 has as its limit."""
    n, dtype = (1536, torch.float32) if device.type == "cpu" else (8192, dtype)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(device, lambda: a @ b)
