"""The GPUs that a plan knows. No imports, so that the command line can list them at once."""

# Dense FP16/BF16 matrix FLOP/s with FP32 accumulation, and memory in GiB: the makers' data sheets.
GPUS: dict[str, tuple[float, float]] = {
    "v100": (125e12, 32),
    "a100": (312e12, 80),
    "h100": (989e12, 80),
    "h200": (989e12, 141),
    "b200": (2250e12, 180),
    "l40s": (362e12, 48),
    "rtx4090": (165e12, 24),
    "mi300x": (1307e12, 192),
}
