"""The fine-tuning recipe. Defaults follow the Peri-LN paper: LIMA, 15 epochs, batch 128, AdamW, 1e-5, cosine."""

from dataclasses import dataclass
from typing import Literal

from periln.runkit.errors import UsageError
from periln.runkit.resume import BITS, NOTHING, PLACE, setting


@dataclass
class Lora:
    """The recipe's section `peft`: low-rank adapters instead of the weights themselves."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None  # null: PEFT's own for the model's type (q_proj and v_proj for ours)
    modules_to_save: list[str] | None = None  # trained whole, and saved with the adapter
    # Rows that are trained, by the name of their module (a list: of the embedding alone, as in PEFT). `auto`: those of
    # our turn tokens, in embedding and head, where the checkpoint has seen no conversation yet; null: none.
    trainable_token_indices: Literal["auto"] | list[int] | dict[str, list[int]] | None = setting("auto", before=None)

    def check(self) -> None:
        """Raise UsageError for an impossible value; names field and value."""
        if self.r < 1 or self.alpha < 1:
            raise UsageError(f"peft.r and peft.alpha must be at least 1, not {self.r} and {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"peft.dropout must be at least 0 and below 1, not {self.dropout}")
        if self.target_modules is not None and not self.target_modules:
            raise UsageError("peft.target_modules is empty: name modules, or leave it out")
        if self.modules_to_save is not None and not self.modules_to_save:
            raise UsageError("peft.modules_to_save is empty: name modules, or leave it out")
        rows = self.trainable_token_indices
        for ids in [] if rows in (None, "auto") else rows.values() if isinstance(rows, dict) else [rows]:
            if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
                raise UsageError(f"peft.trainable_token_indices must be auto, or lists of ids, not {rows!r}")
            if len(set(ids)) != len(ids):
                raise UsageError(f"peft.trainable_token_indices names an id twice: {ids}")


@dataclass
class Recipe:
    """One fine-tuning run."""

    stage: Literal["sft"] = "sft"
    model: str = ""  # weights' hash of the checkpoint that is fine-tuned; filled in
    placement: str | dict = ""  # filled in
    # `hub` (GAIR/lima), `mini` (our own few), or a .jsonl with `conversations` or `messages`
    data: str = setting("hub", decides=PLACE)  # data_sha256 says what lies there
    # the Hub's commit; filled in where the recipe does not pin one
    data_revision: str | None = setting(None, decides=NOTHING)
    data_sha256: str = ""  # of the conversations as read; filled in
    include_multi_turn: bool = False  # the paper takes the single-turn rows
    epochs: int = 15
    batch_size: int = 128
    micro_batch_size: int | None = None
    learning_rate: float = 1e-5
    warmup: float = 0.0  # a share of the steps; ours
    weight_decay: float = 0.0  # ours
    gradient_clip: float = 1.0  # ours
    max_length: int = 2048
    packing: bool = False
    seed: int = 1
    peft: Lora | None = None  # null: all weights are trained
    save_strategy: Literal["epoch", "end"] = setting("epoch", decides=NOTHING)
    # steps; extra checkpoints to resume from, of which only the newest stay
    save_every: int | None = setting(None, decides=NOTHING)
    keep: int | None = setting(None, decides=NOTHING)  # epoch checkpoints that stay, the newest; null: all
    precision: Literal["fp16", "bf16", "fp32"] = "fp16"
    residual_dtype: Literal["float16", "bfloat16", "float32"] | None = "float16"
    initial_loss_scale: float = 65536.0
    device: Literal["cpu", "cuda"] = setting("cpu", decides=BITS)

    def check(self) -> None:
        """Raise UsageError for an impossible value; names field and value."""
        for name in ("epochs", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("save_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, or null, not {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise UsageError(f"learning_rate must be above 0, not {self.learning_rate}")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup is a share of the steps, 0 to 1, not {self.warmup}")
        if self.precision != "fp16" and self.residual_dtype == "float16":
            raise UsageError(f"residual_dtype float16 in a {self.precision} run: give null, float32 or bfloat16")
        micro = self.micro_batch_size or self.batch_size
        if micro < 1 or self.batch_size % micro:
            raise UsageError(f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}")
        if self.data_revision is not None and self.data != "hub":
            raise UsageError(f"data_revision is the Hub's, but data is {self.data!r}")
        if self.peft is not None:
            self.peft.check()
