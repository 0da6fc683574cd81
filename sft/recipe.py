"""The fine-tuning recipe. Defaults follow the Peri-LN paper: LIMA, 15 epochs, batch 128, 1e-5, cosine."""

from dataclasses import dataclass
from typing import Literal

from runkit.errors import UsageError


@dataclass
class Recipe:
    """One fine-tuning run."""

    stage: Literal["sft"] = "sft"
    model: str = ""  # weights' hash of the checkpoint that is fine-tuned; filled in
    placement: str | dict = ""  # filled in
    data: Literal["mini", "hub"] = "hub"
    epochs: int = 15
    batch_size: int = 128
    micro_batch_size: int | None = None
    learning_rate: float = 1e-5
    warmup: float = 0.0  # a share of the steps; ours
    weight_decay: float = 0.0  # ours
    gradient_clip: float = 1.0  # ours
    max_length: int = 2048
    seed: int = 1
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    residual_dtype: Literal["float16", "bfloat16", "float32"] | None = "float16"
    initial_loss_scale: float = 65536.0
    device: Literal["cpu", "cuda"] = "cpu"

    def check(self) -> None:
        """Raise UsageError for a value that cannot be; names field and value."""
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup is a share of the steps, 0 to 1, not {self.warmup}")
        if self.precision != "fp16" and self.residual_dtype == "float16":
            raise UsageError(f"residual_dtype float16 in a {self.precision} run: give null, float32 or bfloat16")
        micro = self.micro_batch_size or self.batch_size
        if micro < 1 or self.batch_size % micro:
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}")
