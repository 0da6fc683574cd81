"""Scores a seed, from run folders or from a CSV file: what every table of scores is computed from.

A row is one model: a pretraining run or its fine-tuning. Scores are fractions, losses nats a token.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd

from periln.eval.records.frames import Frames
from periln.runkit.placements import placement_order
from periln.runkit.sizes import size_name, size_value
from periln.runkit.tasks import SUITES

LOSSES: dict[str, tuple[str | None, str]] = {  # task and metric; None: the mean over the suite's tasks
    "c4_loss": ("c4", "loss"),
    "c4_bits_per_byte": ("c4", "bits_per_byte"),
    "loss": ("heldout", "loss"),
    "bits_per_byte": ("heldout", "bits_per_byte"),
    "gold_bits_per_byte": (None, "gold_bits_per_byte"),
}
KEYS = ["stage", "size", "learning_rate", "placement", "seed"]  # what must be unique
PROVENANCE = (
    "harness",
    "limit",
    "num_fewshot",
    "dtype",
    "tokenizer",
    "tokens",
    "c4_measured_on",
    "heldout_measured_on",
)


@dataclass(frozen=True)
class Scores:
    """`rows` has the columns of `KEYS`, status, run, a column a task (fractions), `LOSSES` and `PROVENANCE`.

    A fine-tuning counts only where the pretraining of that seed completed; `remarks` say what was left out.
    """

    name: str
    tasks: tuple[str, ...]
    rows: pd.DataFrame
    metric: str = "acc"
    remarks: tuple[str, ...] = ()

    @property
    def pretrained(self) -> pd.DataFrame:
        return self.rows[self.rows.stage == "pretrain"]

    @property
    def fine_tuned(self) -> pd.DataFrame:
        """Rows of stage `sft`; `counts` says whether the seed's pretraining did not diverge."""
        rows = self.rows[self.rows.stage == "sft"]
        gone = self.pretrained[self.pretrained.status == "diverged"]
        gone = set(zip(gone["size"], gone.learning_rate.fillna(-1), gone.placement, gone.seed, strict=True))
        keys = zip(rows["size"], rows.learning_rate.fillna(-1), rows.placement, rows.seed, strict=True)
        return rows.assign(counts=pd.Series([key not in gone for key in keys], rows.index, dtype=bool))


# --- sizes ---------------------------------------------------------------------------------------------------


def _sizes(runs: pd.DataFrame) -> pd.Series:
    """A name for the size of each run. Runs of one shape have one size: placements differ in a few gammas."""
    shapes = ["num_layers", "hidden_size", "intermediate_size"]
    shape = runs[shapes].astype(object).where(runs[shapes].notna(), None).apply(tuple, axis=1)
    names: dict[tuple, str] = {}
    for key in dict.fromkeys(shape):
        count = pd.to_numeric(runs.parameters_non_embedding[shape == key]).min()
        layers, width, ffn = ("?" if x is None else f"{int(x)}" for x in key)
        name = f"{layers} layers, width {width}" if pd.isna(count) else size_name(count)
        if name in names.values():
            name += f" ({layers} layers, width {width}, FFN {ffn})"
        names[key] = name
    return shape.map(names)


def in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by stage, size (small first), learning rate, placement in its known order, and seed."""
    order = pd.DataFrame(
        {
            "stage": rows.stage.map({"pretrain": 0, "sft": 1}),
            "value": rows["size"].map(size_value),
            "size": [(tuple(map(int, re.findall(r"\d+", size))), size) for size in rows["size"]],
            "learning_rate": rows.learning_rate,
            "placement": rows.placement.map(placement_order),
            "seed": rows.seed,
        }
    )
    return rows.loc[order.sort_values(list(order), kind="stable").index].reset_index(drop=True)


# --- from run folders ----------------------------------------------------------------------------------------


def _together(values: pd.Series) -> str | None:
    """The values as one text, so that rows with several can be recognized; None where there are none."""
    found = sorted({f"{x:g}" if isinstance(x, float) else str(x) for x in values.dropna()})
    return ", ".join(found) or None


def _taken(frames: Frames, tasks: tuple[str, ...], metric: str) -> pd.DataFrame:
    """The scores that count: `metric` where a task has it, else acc."""
    scores = frames.scores[frames.scores.task.isin(tasks) & frames.scores.metric.isin([metric, "acc"])]
    order = (scores.metric == metric).sort_values(kind="stable").index
    return scores.loc[order].drop_duplicates(["run", "task"], keep="last")


def _mean_over(tasks: tuple[str, ...], scores: pd.DataFrame) -> float | None:
    """The plain mean of a metric over tasks that all have it, each once."""
    values = scores[scores.task.isin(tasks)].drop_duplicates("task", keep="last").value
    return float(values.mean()) if len(values) == len(tasks) else None


def _row(frames: Frames, run: pd.Series, owner: pd.Series, taken: pd.DataFrame, tasks: tuple[str, ...]) -> dict:
    """One row: the run's own scores under the placement, rate, seed and size of the pretraining run it belongs to."""
    every = frames.scores[frames.scores.run == run.run]
    of = taken[taken.run == run.run]
    found = {name: every[(every.task == task) & (every.metric == m)] for name, (task, m) in LOSSES.items() if task}
    means = {n: _mean_over(tasks, every[every.metric == m]) for n, (task, m) in LOSSES.items() if task is None}
    values = of.set_index("task").value
    steps = of.at_step.dropna()
    step = steps.min() if len(steps) else pd.to_numeric(run.step)
    tokens = pd.to_numeric(pd.Series([step, run.batch_size, run.sequence_length], dtype=object)).astype(float)
    return {
        **{"stage": run.stage, "size": owner["size"], "learning_rate": owner.learning_rate},
        **{"placement": owner.placement, "seed": owner.seed, "status": run.status, "run": run.run},
        **{task: values.get(task) for task in tasks},
        **{name: rows.value.iloc[0] if len(rows) else None for name, rows in found.items()},
        **means,
        "harness": _together(of.harness),
        "limit": _together(of.limit.astype(object).where(of.limit.notna(), "none")),
        "num_fewshot": _together(of.num_fewshot),
        "dtype": _together(of.dtype),
        "tokenizer": owner.tokenizer,
        "tokens": tokens.prod(skipna=False) if run.stage == "pretrain" and len(every) else None,
        "c4_measured_on": _together(found["c4_loss"].measured_on),
        "heldout_measured_on": _together(found["loss"].measured_on),
        "step": run.step if run.stage == "pretrain" else None,
        "evaluated_step": step if len(steps) else None,
        "not_chosen": of.chosen.eq(False).any(),  # of.chosen is None where nothing was chosen
    }


def _once(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """One row for each of `KEYS`, the first by name: two runs with one seed are not two observations."""
    said = []
    twice = rows.duplicated(KEYS) & rows.seed.notna()
    for _, same in rows[rows.stage == "pretrain"].groupby(KEYS, sort=False):
        if len(same) > 1:
            first = same.iloc[0]
            said.append(
                f"Placement {first.placement}, learning rate {first.learning_rate:g}, seed {first.seed:g} occurs "
                f"{len(same)} times ({', '.join(same.run)}): only {first.run} counts."
            )
    return rows[~twice], said


def from_runs(frames: Frames, suite: str, metric: str = "acc") -> Scores:
    """The rows of all runs under some folders; for a seed that occurs twice, the first run by name counts."""
    tasks = SUITES[suite]
    runs = frames.pretrained.assign(size=_sizes(frames.pretrained)).set_index("run", drop=False)
    taken, remarks, rows = _taken(frames, tasks, metric), [], []
    for _, run in runs.iterrows():
        rows.append(_row(frames, run, run, taken, tasks))
        inside = frames.runs[(frames.runs.stage == "sft") & (frames.runs.parent == run.run)]
        counts = frames.fine_tuned([run.run])
        rows += [_row(frames, tuned, run, taken, tasks) for _, tuned in counts.iterrows()]
        if len(inside) > 1:
            first = counts.run.iloc[0]
            remarks.append(f"{run.run} was fine-tuned {len(inside)} times ({', '.join(inside.run)}): {first} counts.")
    if frames.left_out:
        remarks.append(f"Fine-tunings outside any pretraining run are left out: {', '.join(frames.left_out)}.")
    frame = pd.DataFrame(rows)
    number = [*tasks, *LOSSES, "learning_rate", "seed", "tokens", "step", "evaluated_step"]
    frame[number] = frame[number].apply(pd.to_numeric).astype(float)
    frame, twice = _once(frame)
    lacking = [t for t in tasks if metric != "acc" and not ((taken.task == t) & (taken.metric == metric)).any()]
    if lacking and len(taken):
        remarks.append(f"{metric} where it was recorded; {', '.join(lacking)}: acc.")
    return Scores(frames.name, tasks, in_order(frame), metric, tuple(twice + remarks))


def block_columns(rows: pd.DataFrame) -> list[str]:
    """What distinguishes the blocks of a table: the size; and the learning rate where a placement has several."""
    rates = rows.groupby(["size", "placement"]).learning_rate.nunique(dropna=False)
    return ["size"] if rates.max() <= 1 else ["size", "learning_rate"]


def seeds_text(seeds: pd.Series) -> str:
    """`seed 1`, `seeds 1 to 3, 5`."""
    values = sorted({int(x) for x in seeds.dropna()})
    if not values:
        return "no seed"
    cuts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(values)) if b != a + 1), len(values)]
    parts = [values[a:b] for a, b in pairwise(cuts)]
    words = [", ".join(map(str, part)) if len(part) < 3 else f"{part[0]} to {part[-1]}" for part in parts]
    return f"seed{'' if len(values) == 1 else 's'} {', '.join(words)}"
