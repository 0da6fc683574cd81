"""Pretraining through Accelerate: `python -m scripts.pretrain --config RECIPE.yaml [...]`.

Loop state stands in one block; the order of a step is: compute, step, record, save.
"""

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradScalerKwargs
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_periln import PeriLlamaForCausalLM
from runkit.checkpoints import latest_whole
from runkit.environment import DtypeWitness, describe_environment
from runkit.errors import StoppedBySignal, UsageError, UserError, make_parser, run_command
from runkit.folder import RunFolder, room_for, write_json
from runkit.fp16 import make_fp16_real
from runkit.process import StopRequest, start_stage
from runkit.progress import progress_bar
from runkit.recipes import from_mapping, read_yaml, to_mapping

from .checkpoint import load_trainer_state, save_checkpoint
from .data import FixedOrder, TokenData
from .layer_stats import LayerStats
from .recipe import Recipe
from .steps import StepBook, learning_rate, make_optimizer


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


class Trainer:
    """One run: built from its recipe, resumed from its folder, trained to its end."""

    def __init__(self, recipe: Recipe, run: RunFolder, data: TokenData):
        self.recipe, self.run, self.data = recipe, run, data
        self.accelerator = self._make_accelerator()
        self.device = self.accelerator.device
        processes = self.accelerator.num_processes
        self.micro = recipe.micro_batch_size or recipe.batch_size // processes
        self.order = FixedOrder(data, recipe.sequence_length, recipe.batch_size, recipe.seed)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(data.tokenizer_path)

        torch.manual_seed(recipe.seed)
        config = resolved_config(recipe, data, self.tokenizer)
        self.model = PeriLlamaForCausalLM(config)
        self.model.train()
        optimizer = make_optimizer(self.model.to(self.device), recipe.optimizer)
        self.prepared, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.book = StepBook(recipe.divergence)
        self.step = 0

    def _make_accelerator(self) -> Accelerator:
        precision = self.recipe.precision
        if self.recipe.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device: cuda was asked for, but torch sees no CUDA device")
        scaler = {
            "init_scale": precision.initial_loss_scale,
            "growth_interval": precision.loss_scale_growth_interval,
        }
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(precision.mode, precision.mode),
            cpu=self.recipe.device == "cpu",
            kwargs_handlers=[GradScalerKwargs(**scaler)],
        )
        self.arithmetic = make_fp16_real(accelerator, scaler)
        return accelerator

    # --- one step ----------------------------------------------------------------------------------------
    def _gradients(self, step: int) -> tuple[float, float]:
        """Forward and backward over the global batch of `step`: (its mean loss, seconds spent on data)."""
        start = time.perf_counter()
        inputs, targets = (torch.from_numpy(x) for x in self.order.batch(step))
        mine = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        inputs, targets = inputs[mine].to(self.device), targets[mine].to(self.device)
        waited = time.perf_counter() - start
        # Every token of the global batch weighs the same; ranks are averaged, so each counts `processes` times.
        items = self.recipe.batch_size * self.recipe.sequence_length / self.accelerator.num_processes
        total = torch.zeros((), device=self.device)
        starts = range(0, len(inputs), self.micro)
        for i in starts:
            last = i == starts[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.prepared):
                loss = self.prepared(
                    input_ids=inputs[i : i + self.micro],
                    shift_labels=targets[i : i + self.micro].contiguous(),
                    num_items_in_batch=items,
                    skip_logits=True,
                    use_cache=False,
                ).loss
                self.accelerator.backward(loss)
            total += loss.detach()
        return self.accelerator.reduce(total, "mean").item(), waited

    @property
    def loss_scale(self) -> float:
        """The scale of this step's loss; 1 without a scaler."""
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0

    def _train_step(self, witness: bool) -> dict[str, Any]:
        recipe, step, start = self.recipe, self.step, time.perf_counter()
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        scale = self.loss_scale
        observe = step % recipe.layer_stats_every == 0
        stats = LayerStats(self.model, step) if observe else nullcontext()
        with self.arithmetic, stats, DtypeWitness(self.model) if witness else nullcontext() as seen:
            loss, waited = self._gradients(step)
        if observe and self.accelerator.is_main_process:
            stats.write(self.run.path / "layers", scale)
        if witness and self.accelerator.is_main_process:
            self._record_environment(seen)
        clip = recipe.optimizer.gradient_clip
        norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), math.inf if clip is None else clip).item()
        if self.accelerator.scaler is not None:
            self.optimizer.step()
            found_inf = self.loss_scale < scale  # the scaler's own word; `step_was_skipped` misses fused AdamW
        else:
            found_inf = not (math.isfinite(norm) and math.isfinite(loss))
            if not found_inf:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        kind = self.book.record(loss, found_inf, scale)
        tokens, seconds = recipe.batch_size * recipe.sequence_length, time.perf_counter() - start
        return {
            "step": step,
            "loss": _finite(loss),
            "learning_rate": rate,
            "grad_norm": _finite(norm),
            "loss_scale": scale,
            "found_inf": found_inf,
            "skip_kind": kind,
            "skips_consecutive": self.book.consecutive,
            "skips_total": self.book.total,
            "tokens": (step + 1) * tokens,
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "data_wait": waited / seconds,
            "mfu": None,
            "peak_memory_bytes": self._peak_memory(),
        }

    def _peak_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _record_environment(self, seen: DtypeWitness) -> None:
        environment = describe_environment(self.device)
        environment["processes"] = self.accelerator.num_processes
        environment["loss_scaler"] = self.accelerator.scaler is not None
        environment["mfu"] = "not measured"
        write_json(self.run.path / "environment.json", environment | seen.report())

    # --- the run -----------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Go back to the newest whole checkpoint; later records are dropped."""
        for left_over in self.run.checkpoints_path.glob(".step_*"):
            shutil.rmtree(left_over)  # of a save or a removal that was killed
        path = latest_whole(self.run, tqdm.write)
        if path is not None:
            self.step = load_trainer_state(path, self.model, self.optimizer, self.accelerator.scaler)
        records = [r for r in self.run.metrics() if r["step"] < self.step]
        if len(records) != self.step:
            raise UserError(
                f"{self.run.metrics_path} has {len(records)} records before step {self.step}, not {self.step}"
            )
        self.run.truncate_metrics(self.step)
        self.book.replay(records)

    def save(self) -> None:
        """A checkpoint after `self.step` steps."""
        if self.accelerator.is_main_process:
            optimizer = self.optimizer.optimizer
            keep = self.recipe.keep_last
            save_checkpoint(self.run, self.step, self.model, self.tokenizer, optimizer, self.accelerator.scaler, keep)

    def train(self, stop: StopRequest, bar: tqdm) -> None:
        """Train to the end, to divergence, or until asked to stop.

        Raises:
            StoppedBySignal: after saving.
        """
        self.run.set_status("running", step=self.step)
        self.resume()
        bar.update(self.step)
        bar.set_postfix_str(self.recipe.name)
        reason, saved, start, witness = self.book.divergence(), self.step, time.monotonic(), True
        with open(self.run.metrics_path, "a") as metrics:
            while self.step < self.recipe.steps and reason is None:
                record = self._train_step(witness)
                witness = False
                metrics.write(json.dumps(record, allow_nan=False) + "\n")
                metrics.flush()
                self.step += 1
                reason = self.book.divergence()
                bar.update(1)
                bar.set_postfix(run=self.recipe.name, loss=record["loss"], scale=record["loss_scale"], refresh=False)
                due = self.step % self.recipe.checkpoint_every == 0
                if due or reason or stop.exit_code or self.step == self.recipe.steps:
                    os.fsync(metrics.fileno())
                    self.save()
                    saved = self.step
                if stop.exit_code and self.step < self.recipe.steps and not reason:
                    self.run.set_status("interrupted", step=self.step, reason=f"signal (exit {stop.exit_code})")
                    raise StoppedBySignal(stop.exit_code, f"stopped after step {saved} of {self.recipe.name}; saved")
        self._final_stats()
        self._finish(reason, time.monotonic() - start)
        bar.update(self.recipe.steps - self.step)

    def _final_stats(self) -> None:
        """The same statistics once more at the final weights, on the batch that would come next; no update."""
        with self.arithmetic, LayerStats(self.model, self.step) as stats:
            self._gradients(self.step)
        stats.write(self.run.path / "layers", self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)

    def _finish(self, reason: str | None, seconds: float) -> None:
        embeddings = {id(p) for p in (self.model.get_input_embeddings().weight, self.model.lm_head.weight)}
        sizes = {id(p): p.numel() for p in self.model.parameters()}
        records = self.run.metrics()
        self.run.set_status(
            "diverged" if reason else "completed",
            step=self.step,
            reason=reason,
            final_loss=records[-1]["loss"],
            tokens=records[-1]["tokens"],
            skipped_steps=self.book.total,
            parameters=sum(sizes.values()),
            parameters_non_embedding=sum(n for i, n in sizes.items() if i not in embeddings),
            seconds_since_last_start=round(seconds, 1),
        )


def resolved_config(recipe: Recipe, data: TokenData, tokenizer: PreTrainedTokenizerBase):
    """The model's configuration with the vocabulary and special tokens of the data.

    Raises:
        UsageError: the recipe names another vocabulary size than the data has.
    """
    asked = recipe.model.get("vocab_size", data.vocab_size)
    if asked != data.vocab_size:
        raise UsageError(f"model.vocab_size {asked} is not the data's: {data.path} has {data.vocab_size} tokens")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return recipe.model_config(vocab_size=data.vocab_size, pad_token_id=tokenizer.pad_token_id, **ids)


def load_recipe(path: Path) -> tuple[Recipe, TokenData]:
    """Read and check a recipe with its data, before any work starts.

    Raises:
        UsageError, UserError: names the field or the path.
    """
    recipe = from_mapping(Recipe, read_yaml(path))
    recipe.check()
    data = TokenData(recipe.data)
    if recipe.data_fingerprint not in (None, data.fingerprint):
        raise UserError(f"data: {recipe.data} has another fingerprint than the recipe {path}")
    recipe.data_fingerprint = data.fingerprint
    asked = recipe.model.get("vocab_size", data.vocab_size)
    if asked != data.vocab_size:
        raise UsageError(f"model.vocab_size {asked} is not the data's: {data.path} has {data.vocab_size} tokens")
    return recipe, data


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    stop = StopRequest().install()
    planned = [(*load_recipe(path), path) for path in args.config]
    names = [recipe.name for recipe, _, _ in planned]
    if len(set(names)) != len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(sorted(n for n in names if names.count(n) > 1))}")
    if len({(recipe.precision.mode, recipe.device) for recipe, _, _ in planned}) > 1:
        raise UsageError("the recipes differ in precision.mode or device; one process can have one: start them apart")
    for recipe, _, _ in planned:
        RunFolder(args.runs / recipe.name).claim(to_mapping(recipe))
    total = sum(recipe.steps for recipe, _, _ in planned)
    with progress_bar(args, total, "pretraining", "step") as bar:
        for recipe, data, _ in planned:
            run = RunFolder(args.runs / recipe.name)
            with run.locked(wait_seconds=30, tell=tqdm.write):
                if run.finished:
                    bar.update(recipe.steps)
                    continue
                _train_one(Trainer(recipe, run, data), stop, bar)
                summary = run.summary
                tqdm.write(
                    f"{recipe.name}: {summary['status']}" + (f", {summary['reason']}" if summary["reason"] else "")
                )


def _train_one(trainer: Trainer, stop: StopRequest, bar: tqdm) -> None:
    try:
        with room_for(trainer.run.path):
            trainer.train(stop, bar)
    except StoppedBySignal:
        raise
    except BaseException as error:
        try:
            trainer.run.set_status("failed", step=trainer.step, reason=f"{type(error).__name__}: {error}")
        except (OSError, UserError):
            pass  # a full disk, say: the error itself is what counts
        raise


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("python -m scripts.pretrain", "Pretrain the runs that recipes describe, one after another.")
    parser.add_argument("--config", type=Path, nargs="+", action="extend", required=True, help="recipes (YAML)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder in which the run folders stand")
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    sys.exit(run_command(main, arguments))
