"""Section `device`: what it is, and the rates that a model could reach on it."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from periln.runkit.environment import describe_environment
from periln.runkit.rates import attainable_flops, seconds_of
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import Place

BACKENDS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")


def attainable_bandwidth(place: Place) -> float:
    """Bytes/s that a copy reads and writes."""
    x = torch.empty(2**22 if place.toy else 2**30, dtype=torch.uint8, device=place.device)
    y = torch.empty_like(x)
    return 2 * x.numel() / seconds_of(place.device, lambda: y.copy_(x))


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
        notes.measure(f"product_flops_{name}", attainable_flops(place.device, dtype))
    notes.measure("copy_bytes_per_second", attainable_bandwidth(place))
    x = torch.randn(64, 4096, dtype=torch.float16)
    exact = x.double() @ x.double().T
    ours = (x.to(place.device) @ x.to(place.device).T).cpu().double()
    error = ((ours - exact).abs() / (exact.abs() + 1)).max().item()
    notes.check("an FP16 product is summed in FP32", error < 2e-3, error, "relative error below 2e-3")
