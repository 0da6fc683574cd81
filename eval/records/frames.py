"""All run folders under a path as tidy frames: the source of tables, figures and the report.

Nothing is measured here and nothing is filled in: what a run did not record is missing in the frames.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, read_json, sha256_of
from periln.runkit.placements import placement_name, placement_order
from periln.runkit.scores import that_count
from periln.runkit.text import printable

_RUNS = [
    *("run", "stage", "parent", "placement", "learning_rate", "seed", "status", "reason", "step", "steps"),
    *("num_layers", "hidden_size", "intermediate_size", "parameters", "parameters_non_embedding", "mode"),
    *("batch_size", "sequence_length", "tokenizer"),
]
_METRICS = ["run", "step", "loss", "grad_norm", "loss_scale", "skip_kind"]
_LAYERS = ["run", "step", "layer", "sublayer", "tensor", "stat", "value"]
_SCORES = [
    *("run", "suite", "limit", "num_fewshot", "harness", "dtype", "at_step", "chosen", "measured_on", "task", "metric"),
    *("value", "stderr", "n", "file"),
]
_SAMPLES = ["run", "prompt", "text"]
# What a loss was measured on and how: losses that differ in one of these cannot be compared.
_MEASURED_ON = ("dataset", "documents", "seed", "packed", "packing", "context", "text_sha256")


@dataclass(frozen=True)
class Frames:
    """The records of all runs under one folder. A run is named by its path below that folder.

    `runs` has a row a run; a fine-tuning run (stage `sft`) names the pretraining run it belongs to as `parent`
    and has that run's placement, learning rate and seed. `metrics`, `layers`, `scores` and `samples` are long.
    """

    name: str
    recipe: dict[str, Any]
    runs: pd.DataFrame
    metrics: pd.DataFrame
    layers: pd.DataFrame
    scores: pd.DataFrame
    samples: pd.DataFrame
    recipes: dict[str, dict[str, Any]]
    environments: dict[str, dict[str, Any]]
    left_out: tuple[str, ...] = ()  # fine-tuning runs outside any pretraining run
    folders: dict[str, Path] = field(default_factory=dict)  # where each run is

    @property
    def pretrained(self) -> pd.DataFrame:
        """The pretraining runs, in the order used everywhere."""
        return self.runs[self.runs.stage == "pretrain"]

    @property
    def learning_rates(self) -> list[float]:
        """Peak learning rates, ascending."""
        return sorted(self.pretrained.learning_rate.unique())

    @property
    def placements(self) -> list[str]:
        """The placements, in their order."""
        return sorted(self.pretrained.placement.unique(), key=placement_order)

    def cell(self, learning_rate: float, placement: str) -> pd.DataFrame:
        """The pretraining runs of one placement at one learning rate: its seeds."""
        runs = self.pretrained
        return runs[(runs.learning_rate == learning_rate) & (runs.placement == placement)]

    def fine_tuned(self, runs: Iterable[str]) -> pd.DataFrame:
        """One fine-tuning run for each pretraining run that has any: `sft`, else the first by name."""
        found = self.runs[(self.runs.stage == "sft") & self.runs.parent.isin(list(runs))]
        first = sorted(found.run, key=lambda run: (PurePosixPath(run).name != "sft", run))
        return found.set_index("run", drop=False).loc[first].drop_duplicates("parent")


def precision_mode(recipe: dict[str, Any]) -> str | None:
    """`fp16`, `bf16` or `fp32`: a section of the recipe, or one field of it."""
    precision = recipe.get("precision")
    return precision.get("mode") if isinstance(precision, dict) else precision


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _find(root: Path) -> dict[str, dict[str, Any]]:
    """Recipes by run name, the folder itself as `.`; checkpoints and hidden folders hold no runs."""
    recipes = {}
    for file in sorted(root.rglob("recipe.yaml")):
        name = file.parent.relative_to(root)
        if not any(part.startswith(".") or part == "checkpoints" for part in name.parts):
            recipes[name.as_posix()] = RunFolder(file.parent).recipe
    return recipes


def _describe(root: Path, run: str, recipes: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of `runs`; None for a fine-tuning run outside any pretraining run."""
    cell = run
    if recipes[run]["stage"] == "sft":
        above = [str(p) for p in PurePosixPath(run).parents]
        cell = next((p for p in above if recipes.get(p, {}).get("stage") == "pretrain"), "")
        if not cell:
            return None
    recipe, summary = recipes[cell], RunFolder(root / run).summary
    model = recipe.get("model") or {}
    rate = _number((recipe.get("optimizer") or {}).get("learning_rate"))
    if math.isnan(rate):
        raise UserError(f"{root / cell / 'recipe.yaml'} names no optimizer.learning_rate")
    return {
        "run": run,
        "stage": recipes[run]["stage"],
        "parent": None if cell == run else cell,
        "placement": placement_name(model),
        "learning_rate": rate,
        "seed": recipe.get("seed"),
        "status": summary.get("status", "not recorded"),
        "reason": printable(summary.get("reason") or ""),
        "step": summary.get("step"),
        "steps": recipes[run].get("steps"),
        "num_layers": model.get("num_hidden_layers"),
        "hidden_size": model.get("hidden_size"),
        "intermediate_size": model.get("intermediate_size"),
        "parameters": summary.get("parameters"),
        "parameters_non_embedding": summary.get("parameters_non_embedding"),
        "mode": precision_mode(recipes[run]),
        "batch_size": recipe.get("batch_size"),
        "sequence_length": recipe.get("sequence_length"),
        "tokenizer": _tokenizer(RunFolder(root / cell)),
    }


def _tokenizer(run: RunFolder) -> str | None:
    """The first characters of the SHA-256 of the tokenizer in a run's newest checkpoint; None where there is none."""
    files = [checkpoint / "tokenizer.json" for checkpoint in run.checkpoints()]
    return sha256_of(files[-1])[:12] if files and files[-1].exists() else None


def read_layers(
    run: str, folder: Path, pattern: str = "step_*.parquet", columns: Sequence[str] = _LAYERS
) -> Iterable[pd.DataFrame]:
    """The tables of a folder of per-layer statistics, by name.

    Raises:
        UserError: a file is damaged or lacks a column; names both.
    """
    for file in sorted(folder.glob(pattern)):
        try:
            frame = pd.read_parquet(file)
        except Exception as error:
            raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
        if missing := [column for column in columns if column != "run" and column not in frame]:
            raise UserError(f"{file} has no column {missing[0]!r}")
        yield frame.assign(run=run)[list(columns)]


def _read_eval(run: str, folder: RunFolder) -> tuple[list[dict], list[dict]]:
    scores, samples = [], []
    selection = folder.path / "best.json"  # for a fine-tuning whose epochs were compared
    best = read_json(selection).get("step") if selection.exists() else None
    for record in folder.evaluations():
        harness = record.get("harness") or {}
        common = {
            "run": run,
            "suite": record.get("suite"),
            "limit": _number(record.get("limit")),
            "num_fewshot": _number(record.get("num_fewshot")),
            "dtype": record.get("dtype"),
            "at_step": (step := _step_of((record.get("evaluated") or {}).get("path"))),
            "chosen": None if best is None else step == best,
            "measured_on": json.dumps({key: record[key] for key in _MEASURED_ON if key in record}, sort_keys=True),
            "harness": " ".join(str(harness[k]) for k in ("name", "version") if harness.get(k)) or None,
            "file": record["file"],
        }
        for result in record.get("results") or []:
            numbers = {key: _number(result.get(key)) for key in ("value", "stderr", "n")}
            if "num_fewshot" in result:  # the actual one; the record's own is what was asked for
                numbers["num_fewshot"] = _number(result["num_fewshot"])
            task = "c4" if record.get("kind") == "c4" else result["task"]
            scores.append(common | {"task": task, "metric": result["metric"]} | numbers)
        for sample in record.get("samples") or []:
            samples.append(
                {"run": run, "prompt": printable(sample.get("prompt", "")), "text": printable(sample.get("text", ""))}
            )
    return scores, samples


def _step_of(path: str | None) -> float:
    """The step of the checkpoint that was evaluated, from its name; NaN for one that is not named by a step."""
    found = re.fullmatch(r"step_(\d+)", PurePosixPath(path or "").name)
    return float(found[1]) if found else math.nan


def _one_of_each(scores: pd.DataFrame) -> pd.DataFrame:
    """One score for each run, task and metric: see `runkit.scores` for which."""
    kept = that_count(scores.to_dict("records"), ("run", "task", "metric"))
    return scores.iloc[kept]


def load(root: str | Path, measurements: bool = True) -> Frames:
    """Read every pretraining run under `root` and the fine-tuning runs inside them.

    Runs that are unfinished, or lack files, are read as far as they go. Where several files of a run's eval folder
    give the same task and metric, `runkit.scores` says which counts.
    Without `measurements`, `metrics` and `layers` are left empty: scores do not need them.

    Raises:
        UserError: no such folder, no runs in it, or a damaged file; the message names the path.
    """
    root = Path(root)
    if not root.is_dir():
        raise UsageError(f"{root} is {'not a folder' if root.exists() else 'missing'}: give a folder of runs")
    recipes = _find(root)
    own = recipes["."] if recipes.get(".", {}).get("stage") == "demo" else {}
    recipes = {run: recipe for run, recipe in recipes.items() if recipe.get("stage") in ("pretrain", "sft")}
    rows = [row for run in recipes if (row := _describe(root, run, recipes))]
    left_out = tuple(sorted(set(recipes) - {row["run"] for row in rows}))
    if not any(row["stage"] == "pretrain" for row in rows):
        raise UsageError(f"{root} holds no run folders (a recipe.yaml with stage: pretrain)")
    rows.sort(key=lambda r: (r["learning_rate"], placement_order(r["placement"]), str(r["seed"]).zfill(9), r["run"]))

    metrics: list[dict[str, Any]] = []
    layers: list[pd.DataFrame] = []
    scores: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    environments: dict[str, Any] = {}
    for run in (row["run"] for row in rows):
        folder = RunFolder(root / run)
        if measurements:
            metrics += [{"run": run} | {key: record.get(key) for key in _METRICS[1:]} for record in folder.metrics()]
            layers += read_layers(run, root / run / "layers")
        found = _read_eval(run, folder)
        scores += found[0]
        samples += found[1]
        environments[run] = _environment(root / run)
    frame = pd.DataFrame(metrics, columns=_METRICS)
    numbers = ["step", "loss", "grad_norm", "loss_scale"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric).astype(float)
    return Frames(
        name=root.resolve().name,
        recipe=own,
        runs=pd.DataFrame(rows, columns=_RUNS),
        metrics=frame,
        layers=pd.concat(layers, ignore_index=True) if layers else pd.DataFrame(columns=_LAYERS),
        scores=_one_of_each(pd.DataFrame(scores, columns=_SCORES)),
        samples=pd.DataFrame(samples, columns=_SAMPLES),
        recipes={row["run"]: recipes[row["run"]] for row in rows},
        environments=environments,
        left_out=left_out,
        folders={row["run"]: root / row["run"] for row in rows},
    )


def nothing_recorded(name: str) -> Frames:
    """Frames without a run."""
    runs, metrics, layers, scores, samples = (
        pd.DataFrame(columns=names) for names in (_RUNS, _METRICS, _LAYERS, _SCORES, _SAMPLES)
    )
    return Frames(name, {}, runs, metrics, layers, scores, samples, recipes={}, environments={})


def load_all(roots: Sequence[str | Path], measurements: bool = True) -> Frames:
    """`load` for several folders; runs are then named by their whole path, and one that is reached twice is read once.

    Raises:
        UserError: see `load`.
    """
    if len(roots) == 1:
        return load(roots[0], measurements)
    parts, seen = [], set()
    for root in roots:
        frames = load(root, measurements)
        paths = {run: Path(root, run) for run in frames.runs.run}
        new = {run: path.as_posix() for run, path in paths.items() if path.resolve() not in seen}
        seen |= {path.resolve() for path in paths.values()}
        parts.append(_renamed(frames, new, root))
    tables = ("runs", "metrics", "layers", "scores", "samples")
    joined = {}
    for name in tables:
        found = [frame for part in parts if len(frame := getattr(part, name))]
        joined[name] = pd.concat(found, ignore_index=True) if found else getattr(parts[0], name)
    for name in ("recipes", "environments", "folders"):
        joined[name] = {run: value for part in parts for run, value in getattr(part, name).items()}
    left_out = tuple(dict.fromkeys(run for part in parts for run in part.left_out))
    return Frames(name=", ".join(part.name for part in parts), recipe={}, left_out=left_out, **joined)


def _renamed(frames: Frames, names: dict[str, str], root: str | Path) -> Frames:
    """The frames of the runs in `names` alone, under their new names."""
    values = {field.name: getattr(frames, field.name) for field in fields(frames)}
    for name in ("runs", "metrics", "layers", "scores", "samples"):
        frame = values[name][values[name].run.isin(list(names))]
        frame = frame.assign(run=frame.run.map(names))
        values[name] = frame.assign(parent=frame.parent.map(names)) if name == "runs" else frame
    for name in ("recipes", "environments", "folders"):
        values[name] = {names[run]: value for run, value in values[name].items() if run in names}
    return Frames(**values | {"left_out": tuple(Path(root, run).as_posix() for run in frames.left_out)})


def _environment(path: Path) -> dict[str, Any]:
    file = path / "environment.json"
    return read_json(file) if file.exists() else {}
