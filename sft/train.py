"""Fine-tune checkpoints on conversations through TRL, in real FP16.

    python -m sft.train --config sft/recipes/lima.yaml --model RUN_OR_CHECKPOINT...

Each result is its own run folder, `sft/` (with --peft `sft-lora/`) inside the run that it starts from. Killed or
interrupted, it resumes from its newest checkpoint when started again, and ends as if nothing had happened.
"""

import sys

from periln.sft.arguments.train import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("sft.train", parse, check))  # parses before the imports below, which take seconds

import argparse
import dataclasses
import math
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

import modeling_periln  # noqa: F401 (registers PeriLlama with the auto classes)
from periln.runkit.checkpoints import chosen_checkpoint, damage_of
from periln.runkit.errors import StoppedBySignal, UsageError, UserError
from periln.runkit.folder import RunFolder, called, read_json, room_for, weights_hash, write_json
from periln.runkit.fp16 import make_fp16_real
from periln.runkit.models import check_loadable, find_model, load_causal_lm, to_stderr
from periln.runkit.process import StopRequest, need_device, quiet_transformers, start_stage
from periln.runkit.progress import progress_bar
from periln.runkit.recipes import apply_overrides, from_mapping, read_yaml
from periln.runkit.steps import final_loss
from periln.runkit.steps import finite as finite_or_none
from periln.sft import lora
from periln.sft.base import name_base_again
from periln.sft.before_after import record_before_after
from periln.sft.checkpointing import latest_resumable
from periln.sft.conversations import Conversations, load_conversations
from periln.sft.own_template import own_template
from periln.sft.recipe import Lora, Recipe
from periln.sft.tokens import Tokens, chat_tokenizer, knows_turns, marked, stop_at_turns, tokenize
from periln.sft.trainer import ExactTrainer, Recorder, arguments


@dataclass
class Job:
    """One fine-tuning that passed all checks, with nothing written yet."""

    recipe: Recipe
    checkpoint: Path
    run: RunFolder
    conversations: Conversations
    tokens: Tokens
    tokenizer: PreTrainedTokenizerBase

    @property
    def template(self) -> dict[str, Any]:
        """For data.json and summary.json: the tokenizer's own chat template, where it is trained with."""
        own = own_template(self.tokenizer)
        return {} if own is None else {"chat_template": own.described()}

    @property
    def steps(self) -> int:
        """Exact without packing."""
        return self.recipe.epochs * math.ceil(len(self.tokens.ids) / self.recipe.batch_size)


def _build_trainer(job: Job, recorder_bar: tqdm, stop: StopRequest, scratch: str) -> ExactTrainer:
    recipe = job.recipe
    # An absolute path, as an adapter names its base by it.
    model = load_causal_lm(job.checkpoint.resolve(), torch.float32)
    if hasattr(model.config, "residual_dtype"):
        model.config.residual_dtype = recipe.residual_dtype
    stop_at_turns(model, job.tokenizer)
    own = own_template(job.tokenizer)
    data: dict[str, Any] = {"messages": job.conversations.messages}
    if own is not None:
        data = {"input_ids": job.tokens.ids, "labels": job.tokens.labels}
    if recipe.peft is not None:
        model = lora.add_adapters(model, recipe.peft, recipe.seed)
    trainer = ExactTrainer(
        job.run,
        recipe,
        Recorder(job.run, model, recorder_bar),
        stop,
        model=model,
        args=arguments(recipe, scratch, labelled=own is not None),
        train_dataset=Dataset.from_dict(data),
        processing_class=job.tokenizer,
    )
    if not recipe.packing and len(trainer.train_dataset) != len(job.tokens.ids):
        raise RuntimeError(f"TRL kept {len(trainer.train_dataset)} conversations, we {len(job.tokens.ids)}")
    return trainer


def fine_tune(job: Job, bar: tqdm, stop: StopRequest) -> None:
    """One fine-tuning from a checkpoint into its run folder, or the rest of one.

    Raises:
        StoppedBySignal: after saving.
    """
    run, recipe = job.run, job.recipe
    rows = {"truncated_rows": job.tokens.truncated, "dropped_rows": job.tokens.dropped}
    of = {"name": job.conversations.name, "revision": job.conversations.revision, "sha256": job.conversations.sha256}
    write_json(run.path / "data.json", of | job.tokens.counts() | rows | job.template)
    checkpoint = latest_resumable(run, tqdm.write)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        trainer = _build_trainer(job, bar, stop, scratch)
        stack.callback(trainer.recorder.close)
        # Without this, TRL's fp16 on a CPU is FP32; on a GPU it changes nothing.
        stack.enter_context(make_fp16_real(trainer.accelerator, {"init_scale": recipe.initial_loss_scale}))
        trainer.train_from(checkpoint)
    step, recorder, model = trainer.state.global_step, trainer.recorder, trainer.model
    known = {"step": step, "steps_per_epoch": trainer.steps_per_epoch, "data": job.conversations.name}
    if stop.exit_code is not None and step < trainer.state.max_steps:
        _interrupted(job, stop, known)
    records = run.metrics()
    if len(records) != step:
        raise RuntimeError(f"{run.metrics_path} has {len(records)} records after {step} steps")
    trained = bool(records) and recorder.skips < step
    finite = trained and records[-1]["loss"] is not None and all(p.isfinite().all() for p in model.parameters())
    if finite:
        trainer.prune(finished=True)

        def pulse() -> None:
            if stop.exit_code is not None:
                _interrupted(job, stop, known)

        latest = run.checkpoint_path(step)
        device = trainer.accelerator.device
        record_before_after(run, job.checkpoint, latest, job.tokens, job.tokenizer, device, pulse)
    run.set_status(
        "completed" if finite else "diverged",
        **known,
        reason=None if finite else "every step was skipped, or the last loss or a weight is not finite",
        final_loss=finite_or_none(final_loss(r["loss"] for r in records)),
        last_loss=records[-1]["loss"] if records else None,
        skipped_steps=recorder.skips,
        **job.tokens.counts(),
        **job.template,
        parameters=sum(p.numel() for p in model.parameters()),
        parameters_trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def _interrupted(job: Job, stop: StopRequest, known: dict) -> None:
    job.run.set_status("interrupted", **known, reason=f"signal (exit {stop.exit_code})")
    raise StoppedBySignal(stop.exit_code, f"stopped after step {known['step']} of {job.run.path}; saved")


# --- what is asked for, and whether it is possible ------------------------------------------------------------
def _source_of(path: Path, name: str) -> tuple[Path, Path] | None:
    """(checkpoint, folder for the result) of a run or checkpoint folder; None for a diverged run."""
    path = Path(called(path))
    if (path / "recipe.yaml").exists() and RunFolder(path).status == "diverged":
        return None
    if not path.exists():
        raise UsageError(f"{path} is neither a run folder (recipe.yaml) nor a checkpoint (config.json)")
    found = find_model(path)
    checkpoint = found.checkpoint()
    check_loadable(checkpoint)
    if found.whole_run:
        return checkpoint, path / name
    run = path.parent.parent  # a run's checkpoint writes to the run; any other to a folder next to it
    return path, run / name if (run / "recipe.yaml").exists() else path.with_name(f"{path.name}-{name}")


def load_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe's file with the flags applied.

    Raises:
        UsageError, UserError: names the field.
    """
    recipe = from_mapping(Recipe, apply_overrides(read_yaml(args.config), args.set, Recipe))
    if args.peft and recipe.peft is None:
        recipe.peft = Lora()
    recipe.check()
    need_device(recipe.device, "device: cuda")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("sft.train runs in one process: start it without torchrun or accelerate launch")
    return recipe


def plan(recipe: Recipe, path: Path, conversations: Conversations, name: str) -> Job | None:
    """The fine-tuning of one run or checkpoint, checked; None for a run that has diverged.

    Raises:
        UsageError, UserError: names the path.
    """
    source = _source_of(path, name)
    if source is None:
        return None
    checkpoint, folder = source
    if not any(checkpoint.glob("*.safetensors")):
        raise UsageError(f"{checkpoint} has no weights in safetensors; pickled ones (.bin, .pt) are not read")
    tokenizer = chat_tokenizer(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    if len(tokenizer) > config.vocab_size:
        raise UsageError(f"the tokenizer of {checkpoint} has {len(tokenizer)} tokens, its model {config.vocab_size}")
    positions = config.max_position_embeddings
    if recipe.max_length > positions:
        raise UsageError(f"max_length {recipe.max_length} exceeds the {positions} positions of {checkpoint}")
    if recipe.peft is not None:
        peft = lora.resolved(recipe.peft, config, tokenizer, knows_turns(checkpoint))
        lora.check_adapters(config, peft)
        recipe = dataclasses.replace(recipe, peft=peft)
    mine = dataclasses.replace(
        _with_a_stream(recipe, config, checkpoint),
        model=weights_hash(checkpoint),
        placement=read_json(checkpoint / "config.json").get("norm_placement", ""),
        data_revision=conversations.revision,
        data_sha256=conversations.sha256,
    )
    run = RunFolder(folder)
    job = Job(
        run.check_claim(mine).recipe,
        checkpoint,
        run,
        conversations,
        tokenize(conversations, tokenizer, recipe.max_length),
        tokenizer,
    )
    if joined := job.tokens.joined:
        to_stderr(
            f"{checkpoint}: {len(joined)} of {len(conversations)} rows are left out, because the tokenizer joins "
            f"the beginning of an answer (white space, mostly) with the prompt: {', '.join(map(str, joined))}"
        )
    before = read_json(run.path / "data.json") if (run.path / "data.json").exists() else job.template
    if before.get("chat_template") != job.template.get("chat_template"):
        raise UserError(f"{run.path} was begun with another chat template than {checkpoint} has now: give --name")
    return job


def _with_a_stream(recipe: Recipe, config: PreTrainedConfig, checkpoint: Path) -> Recipe:
    """The recipe without `residual_dtype` where the model has no such field; the default is left out and said.

    Raises:
        UsageError: another dtype than the default was asked for.
    """
    if hasattr(config, "residual_dtype") or recipe.residual_dtype is None:
        return recipe
    kind, default = config.model_type, Recipe.residual_dtype
    if recipe.residual_dtype != default:
        raise UsageError(
            f"residual_dtype {recipe.residual_dtype}: a {kind} ({checkpoint}) has the stream of its own code; give null"
        )
    to_stderr(f"{checkpoint}: a {kind} has the stream of its own code, so residual_dtype is null and not {default}")
    return dataclasses.replace(recipe, residual_dtype=None)


def _is_over(run: RunFolder) -> bool:
    """Whether a run has ended and its result is still there, whole."""
    last = run.checkpoints()[-1:]
    return run.status == "diverged" or (run.finished and bool(last) and damage_of(last[0]) is None)


def _run_job(job: Job, bar: tqdm, stop: StopRequest) -> None:
    run = job.run
    for adapter in (path for path in run.checkpoints() if job.recipe.peft is not None):
        try:
            if name_base_again(adapter):  # stock PEFT looks for the base nowhere else
                tqdm.write(f"{adapter}: its base has moved, adapter_config.json names it again")
        except UserError:  # damaged: its reader will report that
            pass
    if _is_over(run):
        bar.update(job.steps)
        return
    bar.set_postfix_str(run.path.resolve().parent.name)
    job.recipe = run.claim(job.recipe, tqdm.write)
    if job.recipe.peft is not None and not lora.stops_at_turns(job.checkpoint, job.tokenizer):
        tqdm.write(
            f"{job.checkpoint}: its generation_config.json does not end an answer with the turn, and an adapter has "
            "none itself: merge the adapter (--merge), or give generate() both ends"
        )
    run.set_status("running")
    try:
        with room_for(run.path):
            fine_tune(job, bar, stop)
    except StoppedBySignal:
        raise
    except BaseException as error:
        try:
            run.set_status("failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())}")
        except (OSError, UserError):
            pass  # on a full disk, for example: the original error counts
        raise


def merge_adapter(run: RunFolder) -> None:
    """Write `merged/` of a LoRA run: of the selected checkpoint (best.json), else of the last."""
    whole = chosen_checkpoint(run, tqdm.write)
    if whole is None:
        raise UserError(f"{run.path} has no whole checkpoint to merge")
    out = run.path / "merged" / whole.name
    difference, largest = lora.merge(whole, out)
    tqdm.write(
        f"{out}: the adapter of {whole.name} merged in; logits differ by at most {difference:.1e} (the largest is "
        f"{largest:.1f})"
    )


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    recipe = load_recipe(args)
    quiet_transformers()
    disable_progress_bars()
    if args.merge and recipe.peft is None:
        raise UsageError("--merge: only adapters are merged; give --peft too")
    name = args.name or ("sft" if recipe.peft is None else "sft-lora")
    conversations = load_conversations(recipe.data, recipe.include_multi_turn, recipe.data_revision)
    if args.export_data is not None:
        conversations.export(args.export_data)
        print(f"{args.export_data}: {len(conversations)} conversations of {conversations.name}")
    if args.check_data or (args.export_data is not None and not args.model):
        return
    stop = StopRequest().install()
    jobs = [(path, plan(recipe, path, conversations, name)) for path in args.model]
    if args.show_labels is not None:
        for job in (job for _, job in jobs if job is not None):
            print("\n\n".join(marked(job.tokens, job.tokenizer, args.show_labels)))
        return
    total = sum(job.steps for _, job in jobs if job is not None)
    with progress_bar(args, total, "fine-tuning", "step") as bar:
        for path, job in jobs:
            if job is None:
                tqdm.write(f"{called(path)}: diverged, not fine-tuned")
                continue
            with job.run.locked(wait_seconds=30, tell=tqdm.write):
                _run_job(job, bar, stop)
                if args.merge and job.run.status == "completed":
                    merge_adapter(job.run)
