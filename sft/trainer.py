"""TRL's SFTTrainer as one of our runs: records every step, saves whole checkpoints, resumes bit for bit."""

import json
import math
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTConfig, SFTTrainer

from periln.runkit.environment import DtypeWitness, describe_environment
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, write_json
from periln.runkit.process import StopRequest
from periln.runkit.steps import StepRecord, finite
from periln.sft import checkpointing
from periln.sft.recipe import Recipe
from periln.sft.tokens import IGNORED

# Transformers called it `gradient_checkpointing` before 5.23; TRL switches it on.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)


def arguments(recipe: Recipe, scratch: str, labelled: bool = False) -> SFTConfig:
    """TRL's settings. `scratch` stays empty: checkpoints go to the run folder.

    `labelled`: the data are tokens with labels, which TRL pads and packs and otherwise leaves as they are.
    """
    micro = recipe.micro_batch_size or recipe.batch_size
    config = SFTConfig(
        output_dir=scratch,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.gradient_clip,
        max_length=recipe.max_length,
        fp16=recipe.precision == "fp16",
        bf16=recipe.precision == "bf16",
        assistant_only_loss=not labelled,
        packing=recipe.packing,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=False,
        **{CHECKPOINTING: False},
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="no",  # `Flow` says when
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is recorded as such, not averaged away
        report_to="none",
        disable_tqdm=True,
    )
    return one_device(config)


def one_device(config: SFTConfig) -> SFTConfig:
    """Keep the Trainer to one GPU: otherwise it takes all of them (DataParallel), which multiplies the batch."""
    config._n_gpu = min(config.n_gpu, 1)
    return config


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and environment.json from inside TRL's trainer, and moves the progress bar."""

    def __init__(self, run: RunFolder, model: torch.nn.Module, bar: tqdm):
        self.run, self.bar = run, bar
        self.trainer: SFTTrainer | None = None
        self.skips = self.consecutive = 0
        self._file: TextIO | None = None
        self._witness: DtypeWitness | None = DtypeWitness(model)  # of the first step of this process
        self._scale, self._start, self._found_inf, self._tokens = 1.0, 0.0, False, 0

    def go_to(self, step: int) -> None:
        """Drop the records from `step` on, and continue counting from those before it.

        Raises:
            UserError: records are missing.
        """
        records = [r for r in self.run.metrics() if r["step"] < step]
        if len(records) != step:
            raise UserError(f"{self.run.metrics_path} has {len(records)} records before step {step}, not {step}")
        self.run.truncate_metrics(step)
        if records:
            last = records[-1]
            self.skips, self.consecutive, self._tokens = last["skips_total"], last["skips_consecutive"], last["tokens"]
        self._file = open(self.run.metrics_path, "a")  # noqa: SIM115 (closed by `close`)

    def sync(self) -> None:
        """Records are on the disk before the checkpoint that follows them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler is not None else 1.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if self._witness is not None:
            self._witness.__enter__()
        self._scale, self._start = self.scale, time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self._witness is not None:
            self._witness.__exit__()
            environment = describe_environment(self.trainer.accelerator.device)
            environment["loss_scaler"] = self.trainer.accelerator.scaler is not None
            write_json(self.run.path / "environment.json", environment | self._witness.report())
            self._witness = None

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._found_inf = self.scale < self._scale
        self.skips += self._found_inf
        self.consecutive = self.consecutive + 1 if self._found_inf else 0
        self.bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not logs or "loss" not in logs or "learning_rate" not in logs:
            return
        loss, norm, seconds = logs["loss"], logs.get("grad_norm", math.nan), time.perf_counter() - self._start
        tokens, before = int(logs.get("num_tokens", 0)), self._tokens
        self._tokens = tokens
        record = StepRecord(
            step=state.global_step - 1,
            loss=finite(loss),
            learning_rate=logs["learning_rate"],
            grad_norm=finite(norm),
            loss_scale=self._scale,
            found_inf=self._found_inf,
            skip_kind=None if not self._found_inf else "backward" if math.isfinite(loss) else "forward",
            skips_consecutive=self.consecutive,
            skips_total=self.skips,
            tokens=tokens,
            tokens_per_second=(tokens - before) / seconds,
            step_seconds=seconds,
            data_wait=None,
            mfu=None,
            peak_memory_bytes=self._peak_memory(),
        )
        self._file.write(json.dumps(record.as_json(), allow_nan=False) + "\n")
        self._file.flush()

    def _peak_memory(self) -> int:
        device = self.trainer.accelerator.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Flow(TrainerCallback):
    """When to save, and when to stop: at the end of an epoch, every `save_every` steps, and where asked to stop."""

    def __init__(self, recipe: Recipe, stop: StopRequest):
        self.recipe, self.stop = recipe, stop

    def on_step_end(self, args, state, control, **kwargs) -> None:
        every = self.recipe.save_every
        if every is not None and state.global_step % every == 0:
            control.should_save = True
        if self.stop.exit_code is not None:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        if self.recipe.save_strategy == "epoch":
            control.should_save = True


@contextmanager
def head_through_logits(model: torch.nn.Module) -> Iterator[Callable | None]:
    """The loss to give TRL for a model with an adapter on its head, or None.

    TRL multiplies by the head's own weight, which would leave such an adapter out, and so refuses it; given a loss,
    it takes the model's logits. Within the context it is shown the head under the adapter.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, BaseTunerLayer):
        yield None
        return
    base = model.get_base_model()
    base.get_output_embeddings = head.get_base_layer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*compute_loss_func", FutureWarning)
            yield loss_of_logits
    finally:
        del base.get_output_embeddings


def loss_of_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
    """Mean cross entropy in FP32 over the whole batch's assistant's tokens, from logits (batch, tokens, vocabulary)."""
    logits, targets = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


class ExactTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are ours: see `checkpointing`. Resume with `train_from`."""

    def __init__(self, run: RunFolder, recipe: Recipe, recorder: Recorder, stop: StopRequest, **kwargs: Any):
        with head_through_logits(kwargs["model"]) as loss:
            super().__init__(callbacks=[recorder, Flow(recipe, stop)], compute_loss_func=loss, **kwargs)
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.run, self.recipe, self.recorder = run, recipe, recorder
        self.saved_step: int | None = None
        recorder.trainer = self
        # The Trainer has divided by the whole batch's tokens. In Transformers 5.4 it leaves Accelerate the number of
        # micro-batches too, by which Accelerate divides again.
        self.accelerator.gradient_accumulation_steps = 1
        if self.accelerator.scaler is not None:  # on a GPU; `make_fp16_real` gives the CPU its own
            self.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=recipe.initial_loss_scale)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_dataset) / self.recipe.batch_size)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, or until asked to stop; the last step is saved in either case."""
        step = checkpointing.step_of(checkpoint) if checkpoint else 0
        self.saved_step = step if checkpoint else None
        self.recorder.go_to(step)
        self.recorder.bar.update(step)
        # The Trainer looks for its own trainer_state.json in the folder that it is told to resume from.
        self.train(resume_from_checkpoint=str(checkpoint / checkpointing.STATE) if checkpoint else None)
        self._save_checkpoint(self.model, None)

    # --- what the Trainer calls to save and to resume ----------------------------------------------------
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.state.global_step == self.saved_step:
            return
        self.recorder.sync()
        checkpointing.save(self.run, self, self.processing_class)
        self.saved_step = self.state.global_step
        self.prune()

    def prune(self, finished: bool = False) -> None:
        """Remove the checkpoints that are not kept."""
        epochs_too = self.recipe.save_strategy == "epoch"
        asked = (self.saved_step, self.steps_per_epoch, self.recipe.keep, epochs_too)
        checkpointing.prune(self.run, *asked, finished=finished)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpointing.load_weights(Path(resume_from_checkpoint).parent, self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpointing.load_state(Path(checkpoint).parent, self)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """`_load_optimizer_and_scheduler` has done it."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpointing.load_random_state(Path(checkpoint).parent)
