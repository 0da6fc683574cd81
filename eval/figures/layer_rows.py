"""Per-layer records for the figures: those of the stability bench where a run has them, else the trainer's own.

eval/stability/step_*.parquet    of checkpoints, on the bench's samples (WikiText unless told otherwise)
eval/stability/angles_*.parquet  angular distance between layers
layers/step_*.parquet            of one training batch, written by the trainer
"""

from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import pandas as pd

from periln.eval.figures.measured_models import STAGE
from periln.eval.figures.pieces import NotRecorded
from periln.eval.figures.selection import View
from periln.eval.records.frames import Frames, read_layers
from periln.runkit.folder import read_json

ANGLES = ["run", "step", "layer", "other", "value"]
BENCH = "periln bench RUN --data wikitext --samples 1000"


def _concat(frames: Iterable[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    found = [frame for frame in frames if len(frame)]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=columns)


def bench_folder(frames: Frames, run: str) -> Path | None:
    """The folder of the stability bench's records of a run, or of a model that is not a run."""
    folder = frames.folders.get(run)
    return folder if folder is None or frames.recipes[run].get("stage") == STAGE else folder / "eval" / "stability"


def bench_rows(frames: Frames, runs: Iterable[str]) -> pd.DataFrame:
    """What the stability bench measured on the runs' checkpoints, in the columns of `frames.layers`."""
    folders = {run: folder for run in runs if (folder := bench_folder(frames, run))}
    rows = (part for run, folder in folders.items() for part in read_layers(run, folder))
    return _concat(rows, list(frames.layers.columns))


def angle_rows(view: View) -> pd.DataFrame:
    """Angular distances (run, step, layer, other, value in units of pi).

    Raises:
        NotRecorded: no run has any.
    """
    folders = {run: folder for run in view.runs.run if (folder := bench_folder(view.frames, run))}
    rows = (part for run, folder in folders.items() for part in read_layers(run, folder, "angles_*.parquet", ANGLES))
    found = _concat(rows, ANGLES)
    if found.empty:
        raise NotRecorded(f"Needs angular distances between layers (eval/stability/angles_*.parquet): {BENCH}.")
    return found


def bench_report(frames: Frames, run: str) -> dict[str, Any]:
    """stability.json of a run; empty where the bench has not measured it."""
    folder = bench_folder(frames, run)
    file = folder and folder / "stability.json"
    found = read_json(file) if file and file.exists() else {}
    return found if isinstance(found, dict) else {}


def layer_rows(
    view: View, tensor: str, what: str, stats: Iterable[str], edges: bool = False, both: bool = False
) -> pd.DataFrame:
    """Rows of one tensor's statistics, with a column `source`: `bench` or `trainer`.

    A run's rows come from one source: the bench's where it has several steps from as early to as late as the trainer's,
    or more of them. With `edges` only the first and the last step are wanted, and each is the bench's if
    it has that step (or, for the last, one in the last tenth), else the trainer's. With `both` the rows of the two are
    given together: for the largest of all.

    Raises:
        NotRecorded: neither has any; `what` says in words what is missing.
    """
    stats = set(stats)

    def chosen(rows: pd.DataFrame) -> pd.DataFrame:
        return rows[(rows.tensor == tensor) & rows.stat.isin(stats) & rows.run.isin(view.runs.run)]

    trainer = chosen(view.frames.layers).assign(source="trainer")
    bench = chosen(bench_rows(view.frames, view.runs.run)).assign(source="bench")
    parts = []
    for run in view.runs.run:
        a, b = bench[bench.run == run], trainer[trainer.run == run]
        if both:
            parts += [a, b]
        elif edges and len(a) and len(b):
            parts += _edges(a, b)
        else:
            parts.append(a if _covers(a, b) else b)
    found = _concat(parts, [*view.frames.layers.columns, "source"])
    if found.empty:
        raise NotRecorded(
            f"Needs {what} by layer: runs with layer_stats_every (layers/step_*.parquet, periln pretrain "
            f"writes them), or {BENCH}."
        )
    return found.assign(step=found.step.astype(float), value=found.value.astype(float))


def _covers(bench: pd.DataFrame, trainer: pd.DataFrame) -> bool:
    """Whether the bench's rows cover the steps as well as the trainer's: from start to end, or more steps."""
    if bench.empty or trainer.empty:
        return len(bench) > 0
    steps = bench.step.nunique(), trainer.step.nunique()
    early = bench.step.min() <= trainer.step.min() and bench.step.max() >= 0.9 * trainer.step.max()
    return (early and steps[0] > 1) or steps[0] > steps[1] or steps[1] < 2


def _edges(bench: pd.DataFrame, trainer: pd.DataFrame) -> list[pd.DataFrame]:
    first = bench if bench.step.min() <= trainer.step.min() else trainer
    last = bench if bench.step.max() >= 0.9 * trainer.step.max() else trainer
    start = first[first.step == first.step.min()]
    end = last[last.step == last.step.max()]
    return [start, end] if start.step.max() != end.step.max() else [start]


def source_words(view: View, rows: pd.DataFrame) -> str:
    """What the rows were measured on."""
    parts = []
    for source, same in rows.groupby("source"):
        if source == "trainer":
            parts.append(("one training batch a step", same))
            continue
        for run, of in same.groupby("run", sort=False):
            parts.append((data_words(bench_report(view.frames, run)), of))
    named: dict[str, list[str]] = {}
    for words, of in parts:
        runs = view.runs[view.runs.run.isin(of.run.unique())]
        named.setdefault(words, []).extend(runs.series.map(view.label))
    if len(named) == 1:
        return f"Measured on {next(iter(named))}."
    return " ".join(f"Measured on {words}: {', '.join(dict.fromkeys(who))}." for words, who in named.items())


def data_words(report: dict[str, Any]) -> str:
    """What the bench measured on, as its last checkpoint's entry in stability.json has it."""
    entries = report.get("checkpoints")
    entry = entries[-1] if isinstance(entries, list) and entries and isinstance(entries[-1], dict) else report
    asked = found if isinstance(found := entry.get("asked"), dict) else entry
    data, samples, tokens = asked.get("data"), asked.get("samples"), entry.get("predicted_tokens")
    words = PurePath(data).name if isinstance(data, str) else "the data of the stability bench"
    words = "random ids" if words == "random" else words
    if isinstance(samples, (int, float)):
        words += f", {samples:,.0f} samples"
    if isinstance(tokens, (int, float)):
        words += f" ({tokens:,.0f} predicted tokens)"
    return words
