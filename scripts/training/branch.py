"""A run that begins as another's continuation: the decay of a WSD run, branched from any checkpoint that was kept.

The branch takes the checkpoint, weights and trainer's state, and the records of the steps before it, and resumes from
there as if it had trained them itself. The run that it is from is only read.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modeling_periln import PeriLlamaConfig
from periln.runkit.checkpoints import damage_of
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, write_folder, write_text
from periln.runkit.recipes import flatten, to_mapping
from periln.runkit.resume import as_before
from periln.scripts.recipe import Recipe
from periln.scripts.training.schedules import decay_start

# In these the two may differ: where a run ends and what it does on the way there, what it keeps, watches and runs on.
FREE = {"name", "data", "steps", "branch_from", "compile", "device", "deterministic", "micro_batch_size", "trackers"}
FREE |= {"activation_checkpointing", "checkpoint_every", "layer_stats_every"}
FREE_SECTIONS = ("divergence.", "flight.", "heldout_", "keep_", "spikes.")
FREE_SECTIONS += tuple(f"optimizer.{name}" for name in ("schedule", "decay_shape", "warmup", "final_learning_rate"))
FREE |= {"optimizer.decay"}


def _trunk(checkpoint: Path) -> tuple[RunFolder, int]:
    """The run of a checkpoint, and the steps that it had taken."""
    run = RunFolder(checkpoint.parent.parent)
    if checkpoint not in run.checkpoints():
        raise UserError(f"branch_from: {checkpoint} is not a checkpoint of a run (RUN/checkpoints/step_XXXXXXXX)")
    return run, int(checkpoint.name.removeprefix("step_"))


def check_branch(recipe: Recipe) -> None:
    """Every mistake in `branch_from`, before any work.

    Raises:
        UsageError, UserError: names the field in which the two runs do not fit together, or what is wrong on the disk.
    """
    if recipe.branch_from is None:
        return
    checkpoint = Path(recipe.branch_from)
    run, step = _trunk(checkpoint)
    if damage := damage_of(checkpoint):
        raise UserError(f"branch_from: {damage}")
    if len(run.metrics()) < step:
        raise UserError(f"branch_from: {run.metrics_path} has fewer than {step} records")
    for name, theirs, ours in _differences(run.recipe, recipe):
        if name not in FREE and not name.startswith(FREE_SECTIONS):
            raise UsageError(f"branch_from: {name} is {theirs!r} in {run.path}, not {ours!r}")
    if recipe.steps <= step:
        raise UsageError(f"steps {recipe.steps}: a branch of step {step} needs more")
    rules = recipe.optimizer
    start = decay_start(recipe.steps, rules.schedule, rules.warmup, rules.decay)
    if (rules.schedule != "constant" and start < step) or round(rules.warmup * recipe.steps) > step:
        raise UsageError(
            f"branch_from: the schedule {rules.schedule} would have step {step} in its warm-up or its decay, which "
            f"begins at step {start} of {recipe.steps}: change optimizer.warmup, optimizer.decay or steps"
        )


def _differences(trunk: dict[str, Any], recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """The fields in which two runs differ, and their values; what a recipe does not name has its default."""
    theirs, ours = as_before(Recipe, trunk), to_mapping(recipe)
    models = theirs.pop("model"), ours.pop("model")
    configs = [PeriLlamaConfig(**model) for model in models]
    for name in sorted(models[0].keys() | models[1].keys()):
        if name == "vocab_size" and not all(name in model for model in models):
            continue  # the data's, which are the same
        begun, asked = (getattr(config, name, None) for config in configs)
        if begun != asked:
            yield f"model.{name}", begun, asked
    theirs, ours = flatten(theirs), flatten(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            yield name, theirs.get(name), ours.get(name)


def begin_branch(recipe: Recipe, run: RunFolder) -> None:
    """Give a run that has no checkpoint the one that it begins with, and the records before it. On the main rank."""
    if recipe.branch_from is None or run.checkpoints():
        return
    checkpoint = Path(recipe.branch_from)
    trunk, step = _trunk(checkpoint)
    records: list[dict[str, Any]] = trunk.metrics()[:step]
    write_text(run.metrics_path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))
    with write_folder(run.checkpoint_path(step)) as folder:
        shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
