"""What a card is about: a checkpoint, and its run if it has one."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from periln.runkit.checkpoints import checked, chosen_checkpoint, named_best
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, read_json

IN_A_RUN = ("checkpoints", "merged")  # folders of a run that hold model folders


@dataclass(frozen=True)
class Subject:
    """A model folder with its run. Whatever the run did not record is empty and is not filled in."""

    checkpoint: Path | None
    run: RunFolder | None

    @property
    def name(self) -> str:
        """The run's name, for a fine-tuning preceded by that of the run around it; without a run the folder's."""
        if self.run is None:
            return self.checkpoint.resolve().name
        path = self.run.path.resolve()
        return f"{path.parent.name}-{path.name}" if self.parent is not None else path.name

    @cached_property
    def parent(self) -> RunFolder | None:
        """The pretraining run that contains a fine-tuning."""
        if self.run is None or self.recipe.get("stage") != "sft":
            return None
        above = self.run.path.resolve().parent
        return RunFolder(above) if (above / "recipe.yaml").exists() else None

    @cached_property
    def recipe(self) -> dict[str, Any]:
        return self.run.recipe if self.run is not None and (self.run.path / "recipe.yaml").exists() else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.run.summary if self.run is not None else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        file = self.run.path / "environment.json" if self.run is not None else None
        return read_json(file) if file is not None and file.exists() else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of the steps that this checkpoint has seen."""
        records = self.run.metrics() if self.run is not None else []
        return [r for r in records if self.step is None or r.get("step", 0) < self.step]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The checkpoint's config.json; before it exists, the model section of the recipe."""
        file = self.checkpoint / "config.json" if self.checkpoint is not None else None
        if file is not None and file.exists():
            if not isinstance(config := read_json(file), dict):
                raise UserError(f"{file} is not a configuration: it holds a {type(config).__name__}")
            return config
        model = self.recipe.get("model")
        return {"model_type": "peri_llama", **model} if isinstance(model, dict) else {}

    @property
    def step(self) -> int | None:
        """Optimizer steps that the checkpoint has seen; None where its name does not say."""
        name = self.checkpoint.name.removeprefix("step_") if self.checkpoint is not None else ""
        return int(name) if name.isdigit() else None

    @property
    def records(self) -> Path:
        """The folder that holds `eval` and `figures`: the run's, else the model's own."""
        return self.run.path if self.run is not None else self.checkpoint

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The records of the folder `eval` that are about this checkpoint, or do not name one."""
        return [r for r in RunFolder(self.records).evaluations() if self.is_about_this(r)]

    def figures(self) -> list[Path]:
        """The images that were drawn of the run, by name."""
        return sorted(p for p in (self.records / "figures").glob("*") if p.suffix in (".png", ".svg"))

    def is_about_this(self, record: Any) -> bool:
        """Whether a record of eval/ was measured on this checkpoint: its `evaluated.path` names no other step."""
        if not isinstance(record, dict):
            return False
        name = Path((record.get("evaluated") or {}).get("path") or "").name
        return self.step is None or not name.startswith("step_") or name == self.checkpoint.name

    @cached_property
    def parameters(self) -> int | None:
        """Parameters: what the run recorded, else the sum over the shapes in the weights' files."""
        if self.summary.get("parameters"):
            return self.summary["parameters"]
        files = sorted(self.checkpoint.glob("model*.safetensors")) if self.checkpoint is not None else []
        return sum(map(_parameters_in, files)) or None


def _parameters_in(file: Path) -> int:
    """From the header of a safetensors file, without reading a tensor."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    except SafetensorError as error:
        raise UserError(f"{file} is not a safetensors file ({error})") from error


def find_subject(path: str | Path, step: int | None = None, needs_weights: bool = True) -> Subject:
    """The checkpoint that a run folder or a model folder means.

    For a run it is the one that best.json of a fine-tuning names, else the newest that is whole; or that of `step`.
    Without `needs_weights` a run that has none yet is described by its records alone.

    Raises:
        UserError: neither a run nor a model folder, no such step, or a damaged checkpoint.
    """
    path = Path(path)
    if (path / "recipe.yaml").exists():
        return _of_run(RunFolder(path), step, needs_weights)
    if not any((path / name).exists() for name in ("config.json", "adapter_config.json")):
        what = "is missing" if not path.exists() else "is neither a run folder (recipe.yaml) nor a model (config.json)"
        raise UsageError(f"{path} {what}")
    if step is not None:
        raise UsageError(f"--step {step} is for a run folder, and {path} is a checkpoint")
    checked(path)
    parent = path.resolve().parent
    inside = parent.name in IN_A_RUN and (parent.parent / "recipe.yaml").exists()
    return Subject(path, RunFolder(parent.parent) if inside else None)


def _of_run(run: RunFolder, step: int | None, needs_weights: bool) -> Subject:
    if step is not None:
        checkpoint = run.checkpoint_path(step)
        if not checkpoint.is_dir():
            have = ", ".join(p.name.removeprefix("step_").lstrip("0") or "0" for p in run.checkpoints()) or "none"
            raise UsageError(f"{run.path} has no checkpoint of step {step} (it has: {have})")
        return Subject(checked(checkpoint), run)
    checkpoint = chosen_checkpoint(run)
    if checkpoint is None and needs_weights:
        raise UserError(f"{run.path} has no whole checkpoint")
    return Subject(checkpoint, run)


def listed_checkpoint(run: RunFolder) -> Path | None:
    """`chosen_checkpoint` for a listing, without reading the weights: a damaged one is listed as well."""
    if (best := named_best(run)) is not None:
        return best
    checkpoints = run.checkpoints()
    return checkpoints[-1] if checkpoints else None
