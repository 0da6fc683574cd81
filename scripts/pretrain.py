"""Pretraining through Accelerate: `python -m scripts.pretrain --config RECIPE.yaml [...]`.

Under `torchrun` or `accelerate launch` the same command runs on several processes; see scripts/launch/.
"""

import sys

from periln.scripts.arguments.pretrain import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("scripts.pretrain", parse, check))  # parses before the imports below, which take seconds

import argparse
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from periln.runkit.errors import StoppedBySignal, UsageError, UserError
from periln.runkit.folder import RunFolder, room_for
from periln.runkit.process import StopRequest, start_stage
from periln.runkit.progress import progress_bar
from periln.runkit.recipes import apply_overrides, from_mapping, read_yaml
from periln.scripts.data.token_data import FixedOrder, TokenData
from periln.scripts.origin import Origin, adopt_origin, check_tokenizer, find_origin
from periln.scripts.recipe import Recipe, check_run_name
from periln.scripts.training.branch import check_branch
from periln.scripts.training.engine import LAUNCHED, Engine, pick_device, process_count, process_rank
from periln.scripts.training.heldout import check_heldout_sets
from periln.scripts.training.tracking import check_trackers
from periln.scripts.training.trainer import Trainer
from periln.scripts.training.zero import check_zero

LARGEST_PADDING = 255  # rows of the embedding that no token uses, for a round number


def load_recipe(path: Path, overrides: Sequence[str] = (), runs: Path = Path("runs")) -> tuple[Recipe, TokenData]:
    """Read and check a recipe with its data, before any work starts; `overrides` are such as `seed=2`.

    What `init_from` names is looked up; where it is gone, the run's folder in `runs` says what it was.

    Raises:
        UsageError, UserError: names the field or the path.
    """
    recipe = from_mapping(Recipe, apply_overrides(read_yaml(path), overrides, Recipe))
    check_run_name(recipe.name)
    origin = adopt_origin(recipe, RunFolder(runs / recipe.name))
    recipe.check(process_count())
    pick_device(recipe.device)
    check_zero(recipe, process_count())
    check_trackers(recipe.trackers)
    check_heldout_sets(recipe.heldout_sets, {})
    return recipe, open_data(recipe, path, origin)


def open_data(recipe: Recipe, path: Path, origin: Origin | None = None) -> TokenData:
    """The data of a recipe (of the file `path`) that begins with `origin`; their fingerprint is filled in.

    Raises:
        UsageError, UserError: data that is missing, too little, of another fingerprint, vocabulary or tokenizer.
    """
    data = TokenData(recipe.data)
    FixedOrder(data, recipe.sequence_length, recipe.batch_size, recipe.seed)  # are there tokens for one sequence?
    if recipe.data_fingerprint not in (None, data.fingerprint):
        raise UserError(f"data: {recipe.data} has another fingerprint than the recipe {path}")
    recipe.data_fingerprint = data.fingerprint
    if recipe.distill_from is not None:
        check_tokenizer(find_origin(recipe.distill_from, "distill_from"), data.tokenizer_path, "distill_from")
    asked, have = recipe.model.get("vocab_size", data.vocab_size), data.vocab_size
    if origin is not None:
        check_tokenizer(origin, data.tokenizer_path)
    if recipe.init_from is not None and have > asked:
        raise UsageError(f"init_from: {recipe.init_from} has {asked} tokens, and the data {data.path} have {have}")
    if recipe.init_from is None and not have <= asked <= have + LARGEST_PADDING:
        raise UsageError(
            f"model.vocab_size {asked} is not the data's: {data.path} has {have} tokens (padding by up to "
            f"{LARGEST_PADDING} is fine)"
        )
    return data


def main(args: argparse.Namespace) -> None:
    check(args)
    if LAUNCHED and args.stop_with_parent is None:
        args.stop_with_parent = os.getppid()  # Accelerate's launcher leaves its child behind when it is stopped
    start_stage(args)
    stop = StopRequest().install()
    planned = [load_recipe(path, args.set, args.runs) for path in args.config]
    names = [recipe.name for recipe, _ in planned]
    if len(set(names)) != len(names):
        raise UsageError(f"two recipes have the same name: {', '.join(sorted(n for n in names if names.count(n) > 1))}")
    if len({(recipe.precision.mode, recipe.device) for recipe, _ in planned}) > 1:
        raise UsageError("the recipes differ in precision.mode or device; one process can have one: start them apart")
    is_main = process_rank() == 0  # claims, locks and writes; the other ranks only compute
    planned = [(as_begun(recipe, args, is_main), data) for recipe, data in planned]
    total = sum(recipe.steps for recipe, _ in planned)
    with progress_bar(args, total, "pretraining", "step", shown=is_main) as bar:
        for recipe, data in planned:
            run = RunFolder(args.runs / recipe.name)
            with run.locked(wait_seconds=30, tell=tqdm.write) if is_main else nullcontext():
                engine = Engine(recipe)
                if engine.gather(run.finished)[0]:  # the main rank holds the lock, and knows
                    bar.update(recipe.steps)
                    continue
                trainer = Trainer(recipe, run, data, engine)
                if is_main:
                    run.claim(recipe, tqdm.write)  # only now that nothing is left to be refused
                _train_one(trainer, stop, bar)
                summary = run.summary
                if is_main:
                    reason = f", {summary['reason']}" if summary["reason"] else ""
                    tqdm.write(f"{recipe.name}: {summary['status']}{reason}")


def as_begun(recipe: Recipe, args: argparse.Namespace, is_main: bool) -> Recipe:
    """The recipe with which its run folder continues: fields younger than the run are as before they existed.

    Raises:
        UserError: the folder belongs to another run, or is not what `--resume` expects (on the main rank).
    """
    run = RunFolder(args.runs / recipe.name)
    try:
        recipe = run.check_claim(recipe).recipe
        check_resume(run, args.resume)
        recipe.check(process_count())
        if not run.checkpoints():  # once it has its own, it needs the other run no more
            check_branch(recipe)
    except UserError:
        if is_main:  # one rank says it; the launcher ends the others
            raise
    return recipe


def check_resume(run: RunFolder, mode: str) -> None:
    """Raise UserError where the folder's state is not what `--resume` expects: `must` a checkpoint, `never` a run."""
    if mode == "never" and run.began:
        raise UserError(f"--resume never: {run.path} holds a run already ({run.status or 'no status'}): name another")
    if mode == "must" and not run.checkpoints():
        raise UserError(f"--resume must: {run.path} has no checkpoint to resume from")


def _train_one(trainer: Trainer, stop: StopRequest, bar: tqdm) -> None:
    try:
        with room_for(trainer.run.path):
            trainer.train(stop, bar)
    except StoppedBySignal:
        raise
    except BaseException as error:
        if not trainer.is_main:
            raise
        try:
            trainer.run.set_status("failed", step=trainer.step, reason=f"{type(error).__name__}: {error}")
        except (OSError, UserError):
            pass  # a full disk, say: the error itself is what counts
        raise
