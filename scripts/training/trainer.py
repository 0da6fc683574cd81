"""One pretraining run: built from its recipe, resumed from its folder, trained to its end.

The order of a step is: compute, update, record, save. All ranks do the same; the main one writes.
"""

import dataclasses
import json
import os
import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.checkpoints import latest_whole
from periln.runkit.encoding import before_text, begin_documents_with
from periln.runkit.environment import describe_environment
from periln.runkit.errors import StoppedBySignal, UserError
from periln.runkit.folder import RunFolder, read_json, write_json
from periln.runkit.process import StopRequest
from periln.runkit.spikes import count_spikes
from periln.runkit.steps import StepRecord, final_loss, finite
from periln.scripts.costs import flops_per_token
from periln.scripts.data.token_data import FixedOrder, TokenData
from periln.scripts.gpus import GPUS
from periln.scripts.origin import load_origin
from periln.scripts.parametrization import scale_initial_weights
from periln.scripts.recipe import Recipe
from periln.scripts.training.batches import Batches
from periln.scripts.training.branch import begin_branch
from periln.scripts.training.checkpoint import BEST, load_trainer_state, save_checkpoint
from periln.scripts.training.distill import Teacher, train_only
from periln.scripts.training.engine import Engine
from periln.scripts.training.flight import FlightRecorder
from periln.scripts.training.heldout import check_heldout_sets, heldout_loss, heldout_sequences
from periln.scripts.training.layer_stats import LayerStats, drop_rows, write_rows
from periln.scripts.training.overflow import FirstNonFinite
from periln.scripts.training.peak import PeakMemory
from periln.scripts.training.steps import StepBook, learning_rate, make_optimizer, scales_of, set_rate
from periln.scripts.training.tracking import Tracking
from periln.scripts.training.witness import Witness

DUMPED_STEPS = 64  # records in divergence.json


def resolved_config(recipe: Recipe, data: TokenData, tokenizer: PreTrainedTokenizerBase) -> PeriLlamaConfig:
    """The model's configuration with the vocabulary and special tokens of the data.

    The recipe's own vocabulary, where it names one, may be larger (`pretrain.load_recipe` says by how much).
    """
    ids = {"bos_token_id": before_text(tokenizer)[-1], "eos_token_id": tokenizer.eos_token_id}
    size = recipe.model.get("vocab_size", data.vocab_size)
    return recipe.model_config(vocab_size=size, pad_token_id=tokenizer.pad_token_id, **ids)


def peak_flops(device: torch.device) -> float | None:
    """Dense FP16 FLOP/s of a GPU by its data sheet; None for a CPU, or a GPU that `costs` does not know."""
    name = torch.cuda.get_device_name(device).lower().replace(" ", "") if device.type == "cuda" else ""
    return next((flops for kind, (flops, _) in GPUS.items() if kind in name), None)


class Trainer:
    """One run in one process, or in one of several."""

    def __init__(self, recipe: Recipe, run: RunFolder, data: TokenData, engine: Engine | None = None):
        self.recipe, self.run, self.data = recipe, run, data
        self.engine = engine or Engine(recipe)
        self.device, self.is_main = self.engine.device, self.engine.is_main
        self.memory = PeakMemory(self.device)
        self.memory.reset()
        self.micro = recipe.micro_batch_size or recipe.batch_size // self.engine.processes
        self.order = FixedOrder(data, recipe.sequence_length, recipe.batch_size, recipe.seed)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(data.tokenizer_path)
        begin_documents_with(self.tokenizer, data.begins_with)  # of older data it begins a text as no document does

        environment = run.path / "environment.json"
        before = read_json(environment) if environment.exists() else {}
        torch.manual_seed(recipe.seed)
        self.model = PeriLlamaForCausalLM(resolved_config(recipe, data, self.tokenizer))
        self.origin: dict[str, Any] | None = before.get("init_from")
        if recipe.init_from is not None and not run.checkpoints() and recipe.branch_from is None:
            self.origin = load_origin(recipe, self.model)
        self.scales = scales_of(recipe, self.model.config)
        if self.scales:
            scale_initial_weights(self.model, self.scales)
        self.model.to(self.device)
        self.sizes = {id(p): p.numel() for p in self.model.parameters()}
        self.embeddings = {id(p) for p in (self.model.get_input_embeddings().weight, self.model.lm_head.weight)}
        self.model.train()
        train_only(self.model, recipe.train_only)
        self.teacher = Teacher(recipe, self.model.config, self.engine) if recipe.distill_from is not None else None
        self.engine.prepare(self.model, make_optimizer(self.model, recipe.optimizer, self.scales), recipe)
        self.batches = Batches(recipe, self.order, self.engine, self.micro, self.model.config._attn_implementation)
        tokens = recipe.batch_size // self.engine.processes * recipe.sequence_length
        self.layer_stats = LayerStats(self.engine, tokens * self.model.config.hidden_size)
        self.recorder = None
        if recipe.flight.steps or recipe.compile:  # compiled with the layers, hooks cost nearly nothing
            self.layer_stats.attach()
        if recipe.flight.steps:
            self.recorder = FlightRecorder(recipe, run, self.engine, self.layer_stats)
        self.heldout, self.heldout_sets = None, {}
        self.heldout_hashes = check_heldout_sets(recipe.heldout_sets, before.get("heldout_sets", {}))
        if recipe.heldout_every is not None:
            asked = (data, self.tokenizer, recipe.sequence_length, recipe.heldout_sequences)
            self.heldout = heldout_sequences(*asked)
            self.heldout_sets = {n: heldout_sequences(*asked, Path(file)) for n, file in recipe.heldout_sets.items()}
        self.book = StepBook(recipe.divergence, recipe.spikes, scaled=self.engine.scaler is not None)
        self.flops_per_token = flops_per_token(self.model.config, recipe.sequence_length)
        self.peak_flops = peak_flops(self.device)
        self.step = self.stopped = 0

    # --- one step ----------------------------------------------------------------------------------------
    def _micro_batches(self, step: int) -> list[dict[str, Any]]:
        return self.batches.of(step)

    def _gradients(self, batches: list[dict[str, Any]]) -> float:
        """Forward and backward over the global batch: its mean loss, without the z term."""
        return self._passes(batches).item()

    def _passes(self, batches: list[dict[str, Any]]) -> torch.Tensor:
        """As `_gradients`, without waiting for the device."""
        engine, total = self.engine, torch.zeros((), device=self.device)
        for batch in batches:
            with engine.no_sync(last=batch is batches[-1]), engine.arithmetic():
                loss, entropy = self._losses(self.batches.arguments(batch))
                engine.backward(loss)
            total += entropy.detach()
        return engine.mean(total)

    def _losses(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is differentiated, and the cross entropy of the text's own tokens."""
        if self.teacher is not None:
            return self.teacher.losses(self.engine.prepared, arguments)
        output = self.engine.prepared(**arguments, loss_scale=self.engine.told_scale())
        return output.loss, output.loss if output.z_loss is None else output.cross_entropy

    def _train_step(self, witness: bool, stop: int = 0) -> dict[str, Any]:
        """One step and its record. `witness`: the process's first; `stop`: this rank's wish to stop, `stopped` then
        has the ranks'.
        """
        recipe, step, start, engine = self.recipe, self.step, time.perf_counter(), self.engine
        rate = learning_rate(step, recipe.steps, recipe.optimizer)
        set_rate(engine.optimizer, rate)
        batches = self._micro_batches(step)
        waited = time.perf_counter() - start
        seen = self._look(batches[0]) if witness else None
        observe = step % recipe.layer_stats_every == 0
        with self._watched(observe):
            loss = self._passes(batches)
        if observe:
            self._write_layer_stats(step, engine.loss_scale)
        if witness and self.is_main:
            self._record_environment(seen)
        norm = engine.gradient_norm(recipe.optimizer.gradient_clip)
        if self.recorder:
            self.recorder.keep(step, self.layer_stats.take(), engine.gradient_norms)
        numbers = engine.read(loss, norm, stop)
        loss, norm, scale, found_inf, self.stopped = dataclasses.astuple(numbers)
        engine.step(found_inf, norm)
        kind, spike = self.book.record(loss, found_inf, scale), self.book.spike(norm)
        module = self._first_nonfinite(batches) if kind == "forward" else None
        tokens, seconds = recipe.batch_size * recipe.sequence_length, time.perf_counter() - start
        record = StepRecord(
            step=step,
            loss=finite(loss),
            learning_rate=rate,
            grad_norm=finite(norm),
            loss_scale=scale,
            found_inf=found_inf,
            skip_kind=kind,
            skip_module=module,
            skips_consecutive=self.book.consecutive,
            skips_total=self.book.total,
            spike=spike,
            distillation=finite(engine.mean(self.teacher.take()).item()) if self.teacher else None,
            tokens=(step + 1) * tokens,
            tokens_per_second=tokens / seconds,
            step_seconds=seconds,
            data_wait=waited / seconds,
            mfu=self._mfu(tokens / seconds),
            peak_memory_bytes=self.memory.bytes(),
        ).as_json()
        if witness:
            self.memory.reset()  # what was compiled and looked at now is not of the steps to come
        if self.recorder:
            self.recorder.note(record)
        if self.heldout is not None and (step + 1) % recipe.heldout_every == 0:
            record["heldout_loss"] = finite(heldout_loss(engine, *self.heldout, self.micro))
            for name, texts in self.heldout_sets.items():
                record[f"heldout_loss/{name}"] = finite(heldout_loss(engine, *texts, self.micro))
        return record

    def _look(self, batch: dict[str, Any]) -> Witness:
        seen = Witness(self.engine)
        seen.look(self.batches.arguments(batch))
        return seen

    def _watched(self, observe: bool) -> AbstractContextManager:
        """Around a forward and backward pass: the layers' statistics are collected where they are wanted."""
        self.layer_stats.clear()
        return self.layer_stats.attached() if observe and not self.layer_stats.is_attached else nullcontext()

    def _write_layer_stats(self, step: int, scale: float) -> None:
        rows = [*self.layer_stats.activation_rows([step], [self.layer_stats.take()])]
        rows += self.layer_stats.parameter_rows(step, scale)
        if self.is_main:
            write_rows(self.run.path / "layers" / f"step_{step:08d}.parquet", rows)

    @torch.no_grad()
    def _first_nonfinite(self, batches: list[dict[str, Any]]) -> str | None:
        """The name of the first module whose output is not finite on the batch of this step.

        The weights are the step's own: it was skipped.
        """
        with self.engine.uncompiled(), FirstNonFinite(self.model) as seen:
            for batch in batches:
                with self.engine.arithmetic():
                    self.engine.prepared(**self.batches.arguments(batch))
        names = self.engine.gather(seen.name)
        return next((name for name in names if name is not None), None)

    def _mfu(self, tokens_per_second: float) -> float | None:
        if self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token / (self.peak_flops * self.engine.processes)

    def _record_environment(self, seen: Witness) -> None:
        environment = describe_environment(self.device) | {
            "engine": self.engine.name,
            "processes": self.engine.processes,
            "data": {"fingerprint": self.data.fingerprint, "tokens": len(self.data)} | self._data_options(),
            "parameter_class": type(next(self.model.parameters())).__name__,
            "init_from": self.origin,
            "heldout_sets": self.heldout_hashes,
            "parametrization": {kind: dataclasses.asdict(own) for kind, own in (self.scales or {}).items()} or None,
            "loss_scaler": self.engine.scaler is not None,
            "mfu": "6N + 12LHQT FLOPs a token (scripts/costs.py), of the data sheet's dense FP16 FLOP/s"
            if self.peak_flops
            else "n/a: the device's peak is not known",
        }
        write_json(self.run.path / "environment.json", environment | seen.report())

    def _data_options(self) -> dict[str, Any]:
        """Where the tokens are from; the folder itself may be gone when a card asks."""
        options = self.data.index.get("options") or {}
        return {key: options.get(key) for key in ("source", "dataset_config", "split", "revision", "tokenizer")}

    # --- the run -----------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Go back to the newest whole checkpoint; later records are dropped."""
        path = None
        if self.is_main:
            begin_branch(self.recipe, self.run)
            for left_over in self.run.checkpoints_path.glob(".step_*"):
                shutil.rmtree(left_over)  # of a save or a removal that was killed
            path = latest_whole(self.run, tqdm.write)
            if path is None and self.run.checkpoints():
                raise UserError(f"{self.run.checkpoints_path}: every checkpoint is damaged; remove them to start again")
        path = self.engine.gather(str(path) if path else None)[0]
        if path is not None:
            self.step = load_trainer_state(Path(path), self.engine)
        records = [r for r in self.run.metrics() if r["step"] < self.step]
        if len(records) != self.step:
            raise UserError(
                f"{self.run.metrics_path} has {len(records)} records before step {self.step}, not {self.step}"
            )
        self.engine.wait()
        if self.is_main:
            self.run.truncate_metrics(self.step)
            drop_rows(self.run.path / "layers", self.step)
        self.book.replay(records)
        if self.recorder:
            self.recorder.resume(self.step)

    def save(self) -> None:
        """A checkpoint after `self.step` steps; those that the recipe does not keep are removed."""
        recipe = self.recipe
        if self.recorder:
            self.recorder.write()
        found = [int(path.name.removeprefix("step_")) for path in self.run.checkpoints()]
        steps = sorted({s for s in found if s < self.step} | {self.step})  # later ones were damaged: see `resume`
        keep = set(steps[-recipe.keep_last :])
        if recipe.keep_every is not None:
            keep |= {s for s in steps if s % recipe.keep_every == 0}
        best = self._best(steps) if recipe.keep_best and self.is_main else None
        keep |= {best["step"]} if best else set()
        keep |= {0} if recipe.keep_initial else set()
        save_checkpoint(self.run, self.step, self.engine, self.tokenizer, keep)
        if best:
            write_json(self.run.path / BEST, best)

    def _best(self, steps: list[int]) -> dict[str, Any] | None:
        """Of the checkpoints after `steps` the one of lowest held-out loss, by the records alone."""
        records = {r["step"] + 1: r.get("heldout_loss") for r in self.run.metrics()}
        held = {step: records[step] for step in steps if records.get(step) is not None}
        if not held:
            return None
        step = min(held, key=held.get)
        return {"step": step, "heldout_loss": held[step]}

    def train(self, stop: StopRequest, bar: tqdm) -> None:
        """Train to the end, to divergence, or until asked to stop.

        Raises:
            StoppedBySignal: after saving.
        """
        self._set_status("running", step=self.step)
        self.resume()
        if self.recipe.keep_initial and self.step == 0:
            self.save()
        bar.update(self.step)
        bar.set_postfix_str(self.recipe.name)
        recipe, saved, start, witness = self.recipe, self.step, time.monotonic(), True
        reason = self.book.divergence()
        with Tracking(self.engine, recipe, self.run) as tracking, self._metrics_file() as metrics:
            while self.step < recipe.steps and reason is None:
                record = self._train_step(witness, stop.exit_code or 0)
                witness = False
                if self.is_main:
                    metrics.write(json.dumps(record, allow_nan=False) + "\n")
                    metrics.flush()
                tracking.log(record)
                self.step += 1
                reason = self.book.divergence()
                if reason and self.recorder:
                    self.recorder.diverged(record["step"], reason)
                bar.update(1)
                bar.set_postfix(run=recipe.name, loss=record["loss"], scale=record["loss_scale"], refresh=False)
                # One process need not agree with others, and sees a signal that came since.
                stopped = self.stopped if self.engine.processes > 1 else stop.exit_code or 0
                due = self.step % recipe.checkpoint_every == 0
                if due or reason or stopped or self.step == recipe.steps:
                    if self.is_main:
                        os.fsync(metrics.fileno())
                    self.save()
                    saved = self.step
                if stopped and self.step < recipe.steps and not reason:
                    self._set_status("interrupted", step=self.step, reason=f"signal (exit {stopped})")
                    self.engine.wait()  # a rank that ends first may have the others killed
                    raise StoppedBySignal(stopped, f"stopped after step {saved} of {recipe.name}; saved")
        self._final_stats()
        self._finish(reason, time.monotonic() - start)
        bar.update(recipe.steps - self.step)

    def _metrics_file(self):
        return open(self.run.metrics_path if self.is_main else os.devnull, "a")

    def _set_status(self, status: str, **more: Any) -> None:
        if self.is_main:
            self.run.set_status(status, **more)

    def _final_stats(self) -> None:
        """The same statistics once more at the final weights, on the batch that would come next; no update."""
        with self._watched(True):
            self._gradients(self._micro_batches(self.step))
        self._write_layer_stats(self.step, self.engine.loss_scale)
        self.engine.optimizer.zero_grad(set_to_none=True)

    def _finish(self, reason: str | None, seconds: float) -> None:
        if not self.is_main:
            return
        records = self.run.metrics()
        spikes, early = count_spikes((r["grad_norm"] for r in records), self.recipe.steps, self.recipe.spikes)
        if reason:
            dump = {"step": self.step, "reason": reason, "records": records[-DUMPED_STEPS:]}
            write_json(self.run.path / "divergence.json", dump)
        self.run.set_status(
            "diverged" if reason else "completed",
            step=self.step,
            reason=reason,
            final_loss=finite(final_loss(r["loss"] for r in records)),
            last_loss=records[-1]["loss"],
            tokens=records[-1]["tokens"],
            skipped_steps=self.book.total,
            spikes=spikes,
            spikes_first_tenth=early,
            parameters=sum(self.sizes.values()),
            parameters_non_embedding=sum(n for i, n in self.sizes.items() if i not in self.embeddings),
            seconds_since_last_start=round(seconds, 1),
        )
