"""The pretraining recipe: everything that decides a run.

Where the Peri-LN paper (arXiv 2502.02732) names a value, it is the default here; where it is silent (betas,
eps, clipping, final learning rate, divergence), the default is ours.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from modeling_periln import PeriLlamaConfig
from runkit.errors import UsageError


@dataclass
class Optimizer:
    """AdamW, decoupled as Megatron's `adam` is. Paper: weight decay 0.033, cosine, 10 % warm-up."""

    learning_rate: float = 2e-3
    final_learning_rate: float = 0.1  # a share of learning_rate; ours
    warmup: float = 0.1  # a share of the steps
    weight_decay: float = 0.033
    decay_norms_and_biases: bool = False
    beta1: float = 0.9  # ours
    beta2: float = 0.95  # ours
    eps: float = 1e-8  # ours
    gradient_clip: float | None = 1.0  # ours; null: none
    z_loss: float = 0.0  # ours; DCLM's runs have 1e-4: adds z_loss * log(sum(exp(logits)))^2 to the loss


@dataclass
class Precision:
    """`fp16` and `bf16` are autocast with FP32 master weights; `residual_dtype` is the stream's own."""

    mode: Literal["fp16", "bf16", "fp32"] = "fp16"
    residual_dtype: Literal["float16", "bfloat16", "float32"] | None = "float16"
    initial_loss_scale: float = 65536.0
    loss_scale_growth_interval: int = 2000


@dataclass
class Divergence:
    """When a run counts as diverged, and ends. All ours: the paper names no rule."""

    nonfinite_losses: int = 10  # in a row
    consecutive_skips: int = 50
    loss_rise: float = 1.0  # nats by which the window's mean loss exceeds the lowest such mean so far
    window: int = 16  # steps


@dataclass
class Spikes:
    """When a gradient norm counts as a spike: so many standard deviations above the mean of the steps before."""

    sigmas: float = 6.0
    window: int = 128  # steps


@dataclass
class Flight:
    """The flight recorder: layer statistics of the last steps, written at a skip, a spike, a divergence."""

    steps: int = 16  # kept in memory, and written together; 0: no recorder
    files: int = 32  # beyond them the oldest goes


@dataclass
class Recipe:
    """One pretraining run."""

    name: str
    data: str
    model: dict[str, Any]
    steps: int
    batch_size: int  # sequences a step, over all processes
    sequence_length: int
    stage: Literal["pretrain"] = "pretrain"
    seed: int = 1
    micro_batch_size: int | None = None  # sequences a forward pass and process; null: as many as there are
    device: Literal["auto", "cpu", "cuda"] = "auto"
    document_masking: bool = False  # True: no token attends to another document's
    compile: bool = False
    activation_checkpointing: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)
    precision: Precision = field(default_factory=Precision)
    divergence: Divergence = field(default_factory=Divergence)
    spikes: Spikes = field(default_factory=Spikes)
    layer_stats_every: int = 50  # steps
    flight: Flight = field(default_factory=Flight)
    checkpoint_every: int = 50  # steps
    keep_last: int = 2  # checkpoints; two, so that one damaged on the disk costs no more than the steps since the other
    keep_every: int | None = None  # steps; checkpoints at their multiples stay for good
    keep_best: bool = False  # keeps the checkpoint of lowest held-out loss; needs heldout_every
    heldout_every: int | None = None  # steps between two measurements of the held-out loss
    heldout_sequences: int = 64
    trackers: list[str] | None = None  # Accelerate's: trackio, tensorboard, wandb; null: trackio, where it is installed
    data_fingerprint: str | None = None  # filled in from the data

    def check(self, processes: int = 1) -> None:
        """Every mistake that can be seen without the data.

        Raises:
            UsageError: names field and value.
        """
        positive = ("steps", "batch_size", "sequence_length", "layer_stats_every", "checkpoint_every", "keep_last")
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.optimizer.warmup <= 1:
            raise UsageError(f"optimizer.warmup is a share of the steps, 0 to 1, not {self.optimizer.warmup}")
        if not 0 <= self.optimizer.final_learning_rate <= 1:
            value = self.optimizer.final_learning_rate
            raise UsageError(f"optimizer.final_learning_rate is a share of learning_rate, 0 to 1, not {value}")
        if self.optimizer.learning_rate <= 0:
            raise UsageError(f"optimizer.learning_rate must be above 0, not {self.optimizer.learning_rate}")
        if self.optimizer.gradient_clip is not None and self.optimizer.gradient_clip <= 0:
            raise UsageError(
                f"optimizer.gradient_clip must be above 0, or null for none, not {self.optimizer.gradient_clip}"
            )
        if self.precision.mode != "fp16" and self.precision.residual_dtype == "float16":
            raise UsageError(
                f"precision.residual_dtype float16 in a {self.precision.mode} run would be FP16 in disguise: "
                "give null, float32 or bfloat16"
            )
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}")
        if self.precision.mode == "fp16" and self.precision.initial_loss_scale <= 0:
            raise UsageError(f"precision.initial_loss_scale must be above 0, not {self.precision.initial_loss_scale}")
        if self.precision.loss_scale_growth_interval < 1:
            value = self.precision.loss_scale_growth_interval
            raise UsageError(f"precision.loss_scale_growth_interval must be at least 1, not {value}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self.optimizer, name) < 1:
                raise UsageError(
                    f"optimizer.{name} must be at least 0 and below 1, not {getattr(self.optimizer, name)}"
                )
        if self.optimizer.weight_decay < 0 or self.optimizer.eps <= 0:
            values = f"{self.optimizer.weight_decay} and {self.optimizer.eps}"
            raise UsageError(f"optimizer.weight_decay must be at least 0 and optimizer.eps above 0, not {values}")
        for name in ("nonfinite_losses", "consecutive_skips", "window"):
            if getattr(self.divergence, name) < 1:
                raise UsageError(f"divergence.{name} must be at least 1, not {getattr(self.divergence, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UsageError(f"micro_batch_size must be at least 1, or null, not {self.micro_batch_size}")
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise UsageError(f"name {self.name!r} must be a plain folder name")
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (micro * processes):
            raise UsageError(
                f"batch_size {self.batch_size} is not a multiple of {micro} x {processes} (micro batch x processes)"
            )
        for name in ("keep_every", "heldout_every", "heldout_sequences"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise UsageError(
                f"keep_every {self.keep_every} is not a multiple of checkpoint_every {self.checkpoint_every}"
            )
        if self.keep_best and (self.heldout_every is None or self.checkpoint_every % self.heldout_every):
            raise UsageError(
                f"keep_best needs a heldout_every that divides checkpoint_every {self.checkpoint_every}, not "
                f"{self.heldout_every}"
            )
        if self.optimizer.z_loss < 0:
            raise UsageError(f"optimizer.z_loss must be at least 0, not {self.optimizer.z_loss}")
        if self.spikes.sigmas <= 0 or self.spikes.window < 2:
            values = f"{self.spikes.sigmas} and {self.spikes.window}"
            raise UsageError(f"spikes.sigmas must be above 0 and spikes.window at least 2, not {values}")
        if self.flight.steps < 0 or self.flight.files < 1:
            values = f"{self.flight.steps} and {self.flight.files}"
            raise UsageError(f"flight.steps must be at least 0 (none) and flight.files at least 1, not {values}")
        if "residual_dtype" in self.model:
            raise UsageError("model.residual_dtype belongs to the run: set precision.residual_dtype")
        config = self.model_config()
        if self.sequence_length > config.max_position_embeddings:
            raise UsageError(
                f"sequence_length {self.sequence_length} exceeds model.max_position_embeddings "
                f"{config.max_position_embeddings}"
            )

    def model_config(self, **more: Any) -> PeriLlamaConfig:
        """The model's configuration, with the run's residual dtype.

        Raises:
            UsageError: what the configuration refuses.
        """
        try:
            return PeriLlamaConfig(**(self.model | more), residual_dtype=self.precision.residual_dtype)
        except Exception as error:  # the strict dataclass raises several kinds, all about one field
            raise UsageError(f"model: {' '.join(str(error).split())}") from error
