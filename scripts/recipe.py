"""The pretraining recipe: everything that decides a run.

Where the Peri-LN paper (arXiv 2502.02732) names a value, it is the default here; where it is silent (betas,
eps, clipping, final learning rate, divergence), the default is ours.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any, Literal

from modeling_periln import PeriLlamaConfig
from modeling_periln.conversions import tensor_names
from periln.runkit.errors import UsageError, did_you_mean
from periln.runkit.resume import BITS, NOTHING, PLACE, setting
from periln.runkit.spikes import Spikes
from periln.scripts.optimizers import read_options
from periln.scripts.parametrization import Parametrization


@dataclass
class NormDecay:
    """Weight decay of the norms by their slot; null: as `decay_norms_and_biases` says.

    2605.26895 finds that decay helps the gains of input norms and harms those of output norms.
    """

    input: float | None = None  # A, on a sublayer's input
    output: float | None = None  # B, on its output
    residual: float | None = None  # C, on the stream after the add
    qk: float | None = None  # of queries and keys
    v: float | None = None  # of values
    inner: float | None = None  # before o_proj and down_proj
    embedding: float | None = None
    final: float | None = None


@dataclass
class Optimizer:
    """Paper: Megatron's `adam`, which is AdamW, with weight decay 0.033, cosine, 10 % warm-up."""

    name: str = "adamw"  # a row of scripts/optimizers
    options: dict[str, Any] = field(default_factory=dict)  # that row's own
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.1  # a share of learning_rate, where the schedule decays; ours
    warmup: float = 0.1  # a share of the steps
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # after the warm-up (schedules.py)
    decay: float = 0.2  # the last share of the steps, of wsd alone; ours
    decay_shape: Literal["linear", "1-sqrt"] = "1-sqrt"  # of wsd alone; ours
    weight_decay: float = 0.033
    decay_norms_and_biases: bool = False
    norm_decay: NormDecay = field(default_factory=NormDecay)
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
class Flight:
    """The flight recorder: layer statistics of the last steps, written at a skip, a spike, a divergence."""

    steps: int = 16  # kept in memory, and written together; 0: no recorder
    files: int = setting(32, decides=NOTHING)  # beyond them the oldest goes


_Rule = tuple[Callable[[float], bool], str]  # what a number must be, and in words


def _at_least(least: float, more: str = "") -> _Rule:
    return lambda x: x >= least, f"must be at least {least:g}{more}"


def _above_zero(more: str = "") -> _Rule:
    return lambda x: x > 0, f"must be above 0{more}"


def _share(of: str) -> _Rule:
    return lambda x: 0 <= x <= 1, f"is a share of {of}, 0 to 1"


_BETA: _Rule = (lambda x: 0 <= x < 1, "must be at least 0 and below 1")
NUMBERS: dict[str, _Rule] = {
    "steps": _at_least(1),
    "batch_size": _at_least(1),
    "sequence_length": _at_least(1),
    "seed": _at_least(0),
    "micro_batch_size": _at_least(1, ", or null"),
    "layer_stats_every": _at_least(1),
    "checkpoint_every": _at_least(1),
    "keep_last": _at_least(1),
    "keep_every": _at_least(1),
    "heldout_every": _at_least(1),
    "heldout_sequences": _at_least(1),
    "optimizer.learning_rate": _above_zero(),
    "optimizer.final_learning_rate": _share("learning_rate"),
    "optimizer.warmup": _share("the steps"),
    "optimizer.decay": _share("the steps"),
    "optimizer.weight_decay": _at_least(0),
    **{f"optimizer.norm_decay.{slot.name}": _at_least(0, ", or null") for slot in fields(NormDecay)},
    "optimizer.beta1": _BETA,
    "optimizer.beta2": _BETA,
    "optimizer.eps": _above_zero(),
    "optimizer.gradient_clip": _above_zero(", or null for none"),
    "optimizer.z_loss": _at_least(0),
    **{f"parametrization.base_{of}": _at_least(1, ", or null") for of in ("width", "depth", "head_dim")},
    "precision.initial_loss_scale": _above_zero(),
    "precision.loss_scale_growth_interval": _at_least(1),
    "divergence.nonfinite_losses": _at_least(1),
    "divergence.consecutive_skips": _at_least(1),
    "divergence.loss_rise": _above_zero(),
    "divergence.window": _at_least(1),
    "spikes.sigmas": _above_zero(),
    "spikes.window": _at_least(2),
    "flight.steps": _at_least(0, " (none)"),
    "flight.files": _at_least(1),
}
_TOKENIZERS = "is the data's tokenizer's to say"
NOT_THE_MODELS = {  # what a recipe's `model` cannot say, and why: it would be overruled silently
    "residual_dtype": "belongs to the run: set precision.residual_dtype",
    "dtype": "belongs to the run, whose weights are FP32: set precision.mode",
    "torch_dtype": "belongs to the run, whose weights are FP32: set precision.mode",
    "model_type": "cannot be chosen: the model is peri_llama",
    "bos_token_id": _TOKENIZERS,
    "eos_token_id": _TOKENIZERS,
    "pad_token_id": _TOKENIZERS,
}


def check_run_name(name: Any) -> None:
    """Raise UsageError for what cannot be the name of a run's folder."""
    if not isinstance(name, str) or name.strip() != name or not re.fullmatch(r"(?!\.)[^/\\\x00-\x1f\x7f]+", name):
        raise UsageError(f"name {name!r} must be a plain folder name")


@dataclass
class Recipe:
    """One pretraining run.

    A field decides the run's result, and may not change on a resume, unless it is declared as a `setting` that does
    not. A field that is added later has a default that is, or a `before` that says, what runs did without it.
    """

    name: str = setting(decides=NOTHING)
    data: str = setting(decides=PLACE)  # data_fingerprint says what lies there
    steps: int
    batch_size: int  # sequences a step, over all processes
    sequence_length: int
    model: dict[str, Any] = field(default_factory=dict)  # of PeriLlamaConfig; filled in from `init_from`
    # a checkpoint or a Hub id that the weights are from at the start (scripts/origin.py); null: drawn by the seed
    init_from: str | None = setting(None, decides=PLACE)  # init_sha256 says what lies there
    init_sha256: str | None = None  # of its weights; filled in
    # a checkpoint or a Hub id whose predictions are learned instead of the text's tokens: the loss is KL(it || model)
    distill_from: str | None = setting(None, decides=PLACE)  # distill_sha256 says what lies there
    distill_sha256: str | None = None  # of its weights; filled in
    # modules whose parameters are trained, by their last names (attn_output_norm, embed_tokens); null: all
    train_only: list[str] | None = None
    stage: Literal["pretrain"] = "pretrain"
    seed: int = 1
    # sequences a forward pass and process; null: all of them
    micro_batch_size: int | None = setting(None, decides=BITS)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", decides=BITS)
    document_masking: bool = False  # True: no token attends to another document's
    compile: bool = setting(False, decides=BITS)
    activation_checkpointing: bool = setting(False, decides=BITS)
    # True: algorithms that give the same bits each time, on a GPU too, where they are slower
    deterministic: bool = setting(False, decides=BITS)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parametrization: Parametrization = field(default_factory=Parametrization)
    precision: Precision = field(default_factory=Precision)
    divergence: Divergence = field(default_factory=Divergence)
    spikes: Spikes = field(default_factory=Spikes)
    layer_stats_every: int = 50  # steps
    flight: Flight = field(default_factory=Flight)
    checkpoint_every: int = setting(50, decides=NOTHING)  # steps
    # checkpoints; two, so that one damaged on the disk costs no more than the steps since the other
    keep_last: int = setting(2, decides=NOTHING)
    keep_every: int | None = setting(None, decides=NOTHING)  # steps; checkpoints at their multiples stay for good
    # writes a checkpoint before the first step, and keeps it (the paper's Figure 7a)
    keep_initial: bool = setting(False, decides=NOTHING)
    keep_best: bool = setting(False, decides=NOTHING)  # keeps that of lowest held-out loss; needs heldout_every
    heldout_every: int | None = setting(None, decides=NOTHING)  # steps between two measurements of the held-out loss
    heldout_sequences: int = 64
    # more held-out texts: a name, and a file as heldout.jsonl
    heldout_sets: dict[str, str] = field(default_factory=dict, metadata={"decides": NOTHING})
    # a checkpoint of another run, RUN/checkpoints/step_XXXXXXXX, at which this one begins
    branch_from: str | None = None
    # Accelerate's: trackio, tensorboard, wandb; null: trackio, where it is installed
    trackers: list[str] | None = setting(None, decides=NOTHING)
    data_fingerprint: str | None = None  # filled in from the data

    def check(self, processes: int = 1) -> None:
        """Every mistake that can be seen without the data.

        Raises:
            UsageError: names field and value.
        """
        check_run_name(self.name)
        if not self.model:
            raise UsageError("the field model is missing: give the model's fields, or init_from")
        self._check_numbers()
        read_options(self.optimizer.name, self.optimizer.options)
        self._check_schedule()
        self._check_kept()
        micro = self.micro_batch_size or max(1, self.batch_size // processes)
        if self.batch_size % (micro * processes):
            raise UsageError(
                f"batch_size {self.batch_size} is not a multiple of {micro} x {processes} (micro batch x processes)"
            )
        if self.precision.mode != "fp16" and self.precision.residual_dtype == "float16":
            raise UsageError(
                f"precision.residual_dtype float16 in a {self.precision.mode} run would be FP16 in disguise: "
                "give null, float32 or bfloat16"
            )
        for name, instead in NOT_THE_MODELS.items():
            if name in self.model:
                raise UsageError(f"model.{name} {instead}")
        if self.distill_from is not None and self.optimizer.z_loss:
            raise UsageError(f"optimizer.z_loss {self.optimizer.z_loss:g}: with distill_from the loss has no z term")
        config = self.model_config()
        self.parametrization.check(config, self.model, self.init_from)
        self._check_trained(config)
        if self.sequence_length > config.max_position_embeddings:
            raise UsageError(
                f"sequence_length {self.sequence_length} exceeds model.max_position_embeddings "
                f"{config.max_position_embeddings}"
            )

    def _check_numbers(self) -> None:
        """Each number for itself."""
        for name, (holds, rule) in NUMBERS.items():
            value = reduce(getattr, name.split("."), self)
            if value is not None and not holds(value):
                raise UsageError(f"{name} {rule}, not {value}")

    def _check_trained(self, config: PeriLlamaConfig) -> None:
        """Whether every module of `train_only` is there."""
        if self.train_only is None:
            return
        if not self.train_only:
            raise UsageError("train_only names no module: give null for all")
        known = sorted({name.split(".")[-2] for name in tensor_names(config)})
        for name in self.train_only:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"train_only has {name!r}{hint}, and the model has {', '.join(known)}")

    def _check_schedule(self) -> None:
        """Whether the parts of the schedule fit into the run."""
        rules = self.optimizer
        if rules.schedule == "wsd" and rules.warmup + rules.decay > 1:
            raise UsageError(
                f"optimizer.warmup {rules.warmup} and optimizer.decay {rules.decay} exceed the run: they are shares of "
                "its steps, together at most 1"
            )

    def _check_kept(self) -> None:
        """Which checkpoints stay."""
        if self.keep_every is not None and self.keep_every % self.checkpoint_every:
            raise UsageError(
                f"keep_every {self.keep_every} is not a multiple of checkpoint_every {self.checkpoint_every}"
            )
        for name in self.heldout_sets:
            if not re.fullmatch(r"[\w.-]+", str(name)):
                raise UsageError(f"heldout_sets: {name!r} is not a name: use letters, digits, '.', '_' and '-'")
            if not isinstance(self.heldout_sets[name], str):
                raise UsageError(f"heldout_sets.{name} must be the path of a file, not {self.heldout_sets[name]!r}")
        if self.heldout_sets and self.heldout_every is None:
            raise UsageError("heldout_sets needs heldout_every: the steps between two measurements")
        if self.keep_best and (self.heldout_every is None or self.checkpoint_every % self.heldout_every):
            raise UsageError(
                f"keep_best needs a heldout_every that divides checkpoint_every {self.checkpoint_every}, not "
                f"{self.heldout_every}"
            )

    def model_config(self, **more: Any) -> PeriLlamaConfig:
        """The model's configuration, with the run's residual dtype and what its parametrization sets.

        Raises:
            UsageError: what the configuration refuses.
        """
        try:
            config = PeriLlamaConfig(**(self.model | more), residual_dtype=self.precision.residual_dtype)
            if ruled := self.parametrization.model_fields(config):
                config = PeriLlamaConfig(**(self.model | more | ruled), residual_dtype=self.precision.residual_dtype)
            return config
        except Exception as error:  # the strict dataclass raises several kinds, all about one field
            raise UsageError(f"model: {' '.join(str(error).split())}") from error
