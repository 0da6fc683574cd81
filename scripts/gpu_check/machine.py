"""Section `device`: what it is, and the rates that a model could reach on it."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from periln.runkit.environment import describe_environment
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def seconds_of(place: Place, work: Callable[[], Any], repeats: int = 5) -> float:
    """The shortest of some calls, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        place.synchronize()
        start = time.perf_counter()
        work()
        place.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def attainable_flops(place: Place, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; on a CPU in FP32, whose rate the emulated FP16 has as its limit."""
    n = 512 if place.toy else 8192
    a, b = (torch.randn(n, n, device=place.device, dtype=torch.float32 if place.toy else dtype) for _ in range(2))
    return 2 * n**3 / seconds_of(place, lambda: a @ b)


def attainable_bandwidth(place: Place) -> float:
    """Bytes/s that a copy reads and writes."""
    x = torch.empty(2**22 if place.toy else 2**30, dtype=torch.uint8, device=place.device)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds_of(place, lambda: y.copy_(x))


def attention_backends(place: Place) -> dict[str, bool]:
    """Which of SDPA's backends take a causal FP16 attention, forward and backward."""
    found = {}
    for name in BACKENDS:
        q = torch.randn(1, 2, 128, 64, device=place.device, dtype=torch.float16, requires_grad=True)
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
            found[name.lower()] = True
        except RuntimeError:
            found[name.lower()] = False
    return found


def check_device(place: Place, notes: Notes) -> None:
    environment = describe_environment(place.device)
    notes.measure("environment", environment)
    if not place.toy:
        about = torch.cuda.get_device_properties(place.device)
        notes.measure("memory_bytes", about.total_memory)
        notes.measure("capability", f"{about.major}.{about.minor}")
    notes.measure("sdpa_backends", attention_backends(place))
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)):
        notes.measure(f"product_flops_{name}", attainable_flops(place, dtype))
    notes.measure("copy_bytes_per_second", attainable_bandwidth(place))
    x = torch.randn(64, 4096, dtype=torch.float16)
    exact = x.double() @ x.double().T
    ours = (x.to(place.device) @ x.to(place.device).T).cpu().double()
    error = ((ours - exact).abs() / (exact.abs() + 1)).max().item()
    notes.check("an FP16 product is summed in FP32", error < 2e-3, error, "relative error below 2e-3")
