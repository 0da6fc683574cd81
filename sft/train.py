"""Fine-tune checkpoints on conversations through TRL, in FP16 that is FP16.

    python -m sft.train --config sft/recipes/lima.yaml --model RUN_OR_CHECKPOINT...

Each result is a run folder of its own, `sft/` inside the run that it starts from.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from runkit.checkpoints import damage_of, latest_whole, write_checkpoint
from runkit.environment import DtypeWitness, describe_environment
from runkit.errors import UsageError, UserError, make_parser, run_command
from runkit.folder import RunFolder, room_for, weights_hash, write_json, write_text
from runkit.fp16 import make_fp16_real
from runkit.process import start_stage
from runkit.progress import progress_bar
from runkit.recipes import from_mapping, read_yaml, to_mapping

from .conversations import CHAT_TEMPLATE, END_OF_TURN, load_conversations
from .recipe import Recipe


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and environment.json from inside TRL's trainer, and moves the progress bar."""

    def __init__(self, run: RunFolder, model: torch.nn.Module, bar: tqdm):
        self.run, self.model, self.bar = run, model, bar
        self.trainer: SFTTrainer | None = None
        self.lines: list[str] = []
        self.skips = self.consecutive = 0
        self._witness = DtypeWitness(model)
        self._scale, self._start, self._found_inf = 1.0, 0.0, False

    @property
    def scale(self) -> float:
        scaler = self.trainer.accelerator.scaler
        return scaler.get_scale() if scaler is not None else 1.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self._witness.__enter__()
        self._scale, self._start = self.scale, time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == 0:
            self._witness.__exit__()
            environment = describe_environment(self.trainer.accelerator.device)
            environment["loss_scaler"] = self.trainer.accelerator.scaler is not None
            write_json(self.run.path / "environment.json", environment | self._witness.report())

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._found_inf = self.scale < self._scale
        self.skips += self._found_inf
        self.consecutive = self.consecutive + 1 if self._found_inf else 0
        self.bar.update(1)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs) -> None:
        if not logs or "loss" not in logs or "learning_rate" not in logs:
            return
        loss, norm, seconds = logs["loss"], logs.get("grad_norm", math.nan), time.perf_counter() - self._start
        record = {
            "step": state.global_step - 1,
            "loss": loss if math.isfinite(loss) else None,
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(norm) if math.isfinite(norm) else None,
            "loss_scale": self._scale,
            "found_inf": self._found_inf,
            "skip_kind": None if not self._found_inf else "backward" if math.isfinite(loss) else "forward",
            "skips_consecutive": self.consecutive,
            "skips_total": self.skips,
            "tokens": int(logs.get("num_tokens", 0)),
            "tokens_per_second": None,
            "step_seconds": seconds,
            "data_wait": None,
            "mfu": None,
            "peak_memory_bytes": None,
        }
        self.lines.append(json.dumps(record, allow_nan=False))


def _arguments(recipe: Recipe, scratch: str) -> SFTConfig:
    micro = recipe.micro_batch_size or recipe.batch_size
    return SFTConfig(
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
        assistant_only_loss=True,
        packing=False,
        use_cpu=recipe.device == "cpu",
        dataloader_pin_memory=False,
        activation_checkpointing=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a loss that is not finite is recorded as such, not averaged away
        report_to="none",
        disable_tqdm=True,
    )


def fine_tune(recipe: Recipe, checkpoint: Path, run: RunFolder, messages: list[list[dict]], bar: tqdm) -> None:
    """One fine-tuning, from a checkpoint into a run folder of its own."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    missing = [t for t in ("<|user|>", "<|assistant|>", END_OF_TURN) if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"the tokenizer of {checkpoint} has no token {', '.join(missing)} for conversations")
    tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    if recipe.max_length > model.config.max_position_embeddings:
        limit = model.config.max_position_embeddings
        raise UsageError(f"max_length {recipe.max_length} exceeds the {limit} positions of {checkpoint}")
    model.config.residual_dtype = recipe.residual_dtype
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        recorder = Recorder(run, model, bar)
        trainer = SFTTrainer(
            model=model,
            args=_arguments(recipe, scratch),
            train_dataset=Dataset.from_dict({"messages": messages}),
            processing_class=tokenizer,
            callbacks=[recorder],
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        recorder.trainer = trainer
        # TRL's fp16 on a CPU is FP32 unless this is done; on a GPU nothing is changed.
        stack.enter_context(make_fp16_real(trainer.accelerator, {"init_scale": recipe.initial_loss_scale}))
        trainer.train()
        steps = trainer.state.global_step
    write_text(run.metrics_path, "".join(line + "\n" for line in recorder.lines))
    records = run.metrics()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    model.generation_config.eos_token_id = ends
    model.config.use_cache = True  # the Trainer switches it off, and would leave it so in config.json
    with write_checkpoint(run.checkpoint_path(steps), model, tokenizer):
        pass
    trained = bool(records) and recorder.skips < steps
    finite = trained and records[-1]["loss"] is not None and all(p.isfinite().all() for p in model.parameters())
    loss = records[-1]["loss"] if records else None
    run.set_status(
        "completed" if finite else "diverged",
        step=steps,
        reason=None if finite else "every step was skipped, or the last loss or a weight is not finite",
        final_loss=loss,
        conversations=len(messages),
        skipped_steps=recorder.skips,
    )


def _source_of(path: Path) -> tuple[Path, Path] | None:
    """(checkpoint, folder for the result) of a run or checkpoint folder; None for a diverged run."""
    if (path / "recipe.yaml").exists():
        run = RunFolder(path)
        if run.status == "diverged":
            return None
        checkpoint = latest_whole(run)
        if checkpoint is None:
            raise UserError(f"{path} has no whole checkpoint (status: {run.status or 'not started'})")
        return checkpoint, path / "sft"
    if (path / "config.json").exists():
        run = path.parent.parent  # a checkpoint of a run writes to the run; any other to a folder beside it
        return path, run / "sft" if (run / "recipe.yaml").exists() else path.with_name(path.name + "-sft")
    raise UserError(f"{path} is neither a run folder (recipe.yaml) nor a checkpoint (config.json)")


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    recipe = from_mapping(Recipe, read_yaml(args.config))
    recipe.check()
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for, but torch sees no CUDA device")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    sources = [(path, _source_of(path)) for path in args.model]
    messages = load_conversations(recipe.data)
    if args.check_data:
        return
    if not sources:
        raise UsageError("--model: name at least one run or checkpoint folder")
    steps = recipe.epochs * math.ceil(len(messages) / recipe.batch_size)
    with progress_bar(args, steps * len(sources), "fine-tuning", "step") as bar:
        for path, source in sources:
            if source is None:
                tqdm.write(f"{path.name}: diverged, not fine-tuned")
                bar.update(steps)
                continue
            checkpoint, folder = source
            run = RunFolder(folder)
            recipe.model, recipe.placement = weights_hash(checkpoint), _placement(checkpoint)
            run.claim(to_mapping(recipe))
            with run.locked(wait_seconds=30, tell=tqdm.write):
                if run.finished and (run.status == "diverged" or damage_of(run.checkpoints()[-1]) is None):
                    bar.update(steps)
                    continue
                bar.set_postfix_str(path.name)
                run.set_status("running")
                with room_for(run.path):
                    fine_tune(recipe, checkpoint, run, messages, bar)


def _placement(checkpoint: Path) -> Any:
    return json.loads((checkpoint / "config.json").read_text()).get("norm_placement", "")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m sft.train", "Supervised fine-tuning on LIMA-format conversations.")
    parser.add_argument("--config", type=Path, default=Path("sft/recipes/lima.yaml"), help="recipe (YAML)")
    parser.add_argument("--model", type=Path, nargs="+", action="extend", default=[], help="run or checkpoint folders")
    parser.add_argument("--check-data", action="store_true", help="only load the conversations, and stop")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
