"""Experiment trackers through Accelerate: trackio, tensorboard, wandb; offline unless the environment asks."""

import os
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from runkit.errors import UsageError, did_you_mean
from runkit.folder import RunFolder
from runkit.recipes import flatten, to_mapping

from .engine import Engine
from .recipe import Recipe

PROJECT = "peri-llama"


def check_trackers(names: list[str]) -> None:
    """Raise UsageError for a tracker that Accelerate does not know, or that is not installed."""
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
            raise UsageError(f"trackers: {name!r} is unknown{did_you_mean(name, known)}: use some of {known}")
        if name not in get_available_trackers():
            raise UsageError(f"trackers: {name} is not installed: pip install {name}")


class Tracking:
    """A context manager: started trackers of a run, on the main rank; nothing where the recipe names none."""

    def __init__(self, engine: Engine, recipe: Recipe, run: RunFolder):
        self.engine, self.recipe, self.run = engine, recipe, run
        self._trackers: list = []

    def __enter__(self) -> "Tracking":
        if not self.recipe.trackers or not self.engine.is_main:
            return self
        os.environ.setdefault("WANDB_MODE", "offline")
        config = {
            k: v if isinstance(v, (int, float, str, bool)) else str(v)
            for k, v in flatten(to_mapping(self.recipe)).items()
        }
        for name in self.recipe.trackers:
            kind = LOGGER_TYPE_TO_CLASS[name]
            place = {"logging_dir": self.run.path / name} if kind.requires_logging_directory else {}
            run_name = self.recipe.name if kind.requires_logging_directory else PROJECT
            tracker = kind(run_name, **place, **({"name": self.recipe.name} if name in ("trackio", "wandb") else {}))
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(config)
            self._trackers.append(tracker)
        return self

    def __exit__(self, *exc: object) -> None:
        for tracker in self._trackers:
            tracker.finish()

    def log(self, record: dict[str, Any]) -> None:
        """One step's numbers."""
        numbers = {k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])
