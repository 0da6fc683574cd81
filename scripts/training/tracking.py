"""Experiment trackers through Accelerate: trackio, tensorboard, wandb; offline unless the environment asks.

They watch a run and decide nothing about it: one that fails is named and left out, and the run continues. Steps that
are done again after a kill are logged again; metrics.jsonl has each once.

    trackio      RUNS/.trackio, a database for all runs of the folder; TRACKIO_DIR=RUNS/.trackio trackio show
    tensorboard  RUN/tensorboard
    wandb        RUN/wandb
"""

import io
import os
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from tqdm import tqdm

from periln.runkit.errors import UsageError, did_you_mean
from periln.runkit.folder import RunFolder
from periln.runkit.recipes import flatten, to_mapping
from periln.scripts.recipe import Recipe
from periln.scripts.training.engine import Engine

PROJECT, DEFAULT = "peri-llama", "trackio"


def installed_trackers() -> list[str]:
    """Names of the trackers that Accelerate finds; its own list holds members of an enum, which equal no name."""
    return [str(tracker) for tracker in get_available_trackers()]


def check_trackers(names: list[str] | None) -> None:
    """Raise UsageError for a tracker that Accelerate does not know, or that is not installed."""
    for name in names or ():
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"trackers: {name!r} is unknown{did_you_mean(name, known)}: use some of {known}")
        if name not in installed_trackers():
            raise UsageError(f"trackers: {name} is not installed: pip install {name}")


def _options(name: str, recipe: Recipe, run: RunFolder) -> tuple[str, dict[str, Any], Path | None]:
    """A tracker's run name, its further arguments, and where it writes, as far as that is known."""
    place = run.path / name
    if name == "trackio":
        # The place is the environment's to say, and read once in a process: one for all runs of the folder.
        place = Path(os.environ.setdefault("TRACKIO_DIR", str(run.path.parent.resolve() / ".trackio")))
        return PROJECT, {"name": recipe.name, "resume": "allow", "embed": False, "auto_log_cpu": False}, place
    if name == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        return PROJECT, {"name": recipe.name, "dir": str(run.path)}, place
    if LOGGER_TYPE_TO_CLASS[name].requires_logging_directory:
        return recipe.name, {"logging_dir": place}, place
    return PROJECT, {}, None


class Tracking:
    """A context manager: started trackers of a run, on the main rank; nothing where the recipe says `[]`."""

    def __init__(self, engine: Engine, recipe: Recipe, run: RunFolder):
        self.engine, self.recipe, self.run = engine, recipe, run
        self._trackers: list[GeneralTracker] = []

    def __enter__(self) -> "Tracking":
        if not self.engine.is_main:
            return self
        names = self.recipe.trackers
        if names is None:
            names = [DEFAULT] if DEFAULT in installed_trackers() else []
            if not names:
                tqdm.write(f"trackers: none, {DEFAULT} is not installed")
        for name in names:
            run_name, more, place = _options(name, self.recipe, self.run)
            if self._guarded(name, lambda args=(name, run_name, more): self._start(*args)):
                tqdm.write(f"trackers: {name}{f', in {place}' if place else ''}")
        return self

    def _start(self, name: str, run_name: str, more: dict[str, Any]) -> None:
        tracker = LOGGER_TYPE_TO_CLASS[name](run_name, **more)
        if hasattr(tracker, "start"):
            tracker.start()
        flat = flatten(to_mapping(self.recipe)).items()
        tracker.store_init_configuration({k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in flat})
        self._trackers.append(tracker)

    def _guarded(self, name: str, work: Callable[[], Any]) -> bool:
        """Do the work without the tracker's own output; its error is reported, and ends nothing."""
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                work()
        except Exception as error:  # whatever a tracker raises, training is not to stop for it
            tqdm.write(f"trackers: {name} failed and is left out ({type(error).__name__}: {error})")
            return False
        return True

    def __exit__(self, *exc: object) -> None:
        for tracker in self._trackers:
            self._guarded(tracker.name, tracker.finish)

    def log(self, record: dict[str, Any]) -> None:
        """One step's numbers."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in list(self._trackers):
            if not self._guarded(tracker.name, lambda t=tracker: t.log(numbers, step=record["step"])):
                self._trackers.remove(tracker)
