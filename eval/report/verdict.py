"""The report's verdict: what the records of the runs say, in sentences."""

import math
from typing import Any

import pandas as pd

from periln.eval.records.derived import at_edge, by_depth
from periln.eval.records.frames import Frames
from periln.eval.records.words import rate_text
from periln.eval.tables.report_tables import cell_numbers, plural, suites
from periln.eval.tables.run_stability import status_text
from periln.runkit.public import public
from periln.runkit.tasks import CHANCE, SUITES


def run_text(run: pd.Series) -> str:
    return f"{run.placement}, {rate_text(run.learning_rate)}, seed {run.seed}"


def _fate(runs: pd.DataFrame) -> str:
    """What became of the runs at one learning rate."""
    open_ = [
        f"{run.placement} seed {run.seed} ({status_text(run)}" + (f": {public(run.reason)})" if run.reason else ")")
        for _, run in runs[runs.status != "completed"].iterrows()
    ]
    completed = f"{(runs.status == 'completed').sum()} of {plural(len(runs), 'run')} completed"
    return f"{completed}. Not completed: {'; '.join(open_)}." if open_ else f"{completed}."


def _loss(frames: Frames, rate: float) -> list[str]:
    found = cell_numbers(frames, "mini")
    found = found[(found.learning_rate == rate) & (found.column == "loss") & (found.n > 0)]
    sized = found["size"].nunique() > 1
    parts = [
        " ".join([row.placement, *([row["size"]] if sized else []), f"{row['mean']:.3f} (n={row.n:g})"])
        for _, row in found.iterrows()
    ]
    return [f"Held-out loss in nats a token, mean of the seeds that completed: {', '.join(parts)}."] if parts else []


def _growth(frames: Frames, rate: float) -> list[str]:
    """The stream's variance after the last layer, at initialization and at the end."""
    parts, data = [], by_depth(frames.layers, "variance", "stream")
    for placement in frames.placements:
        runs = frames.cell(rate, placement)
        of = data[data.run.isin(runs.run[runs.status != "diverged"])]
        if len(of):
            deepest = of[of.x == of.x.max()]
            start, end = (at_edge(deepest, last).y.mean() for last in (False, True))
            parts.append(f"{placement} {start:.3g} to {end:.3g}")
    when = "from the first to the last recorded step, mean of the seeds that did not diverge"
    return [f"Variance of the stream after the last layer, {when}: {', '.join(parts)}."] if parts else []


def _precision(frames: Frames, numbers: pd.DataFrame) -> list[str]:
    """Headroom, spikes and skips by placement; `numbers` are those of one learning rate."""
    bits, counts = [], []
    for placement in frames.placements:
        of = numbers[numbers.placement == placement]
        measured, recorded = of[of.headroom_at.notna()], of[of.measured_steps > 0]
        if len(measured):
            row = measured.loc[measured.headroom_bits.idxmin()]
            left = f"{row.headroom_bits:.1f} bits" if math.isfinite(row.headroom_bits) else "none, overflow"
            bits.append(f"{placement} {left} ({row.headroom_at}, seed {row.seed})")
        if len(recorded):
            skipped = plural(sum(sum(skips.values()) for skips in recorded.skips), "skipped step")
            spiked = plural(sum(map(len, recorded.spikes)), "gradient spike")
            counts.append(f"{placement} {spiked} and {skipped} in {recorded.measured_steps.sum()}")
    said = [f"Least FP16 headroom at the recorded steps: {'; '.join(bits)}."] if bits else []
    return said + ([f"Spikes and skips, all seeds: {'; '.join(counts)}."] if counts else [])


def noise(frames: Frames, suite: str) -> dict[str, Any] | None:
    """What the scores of completed runs can distinguish; None without scores.

    `gap` is the largest difference of Avg. between placements at one learning rate, `error` the standard error of
    such a difference, from the largest standard error recorded for each task: items of one task are shared by all
    runs, so that more seeds do not lower it.
    """
    completed = frames.pretrained[frames.pretrained.status == "completed"]
    scores = frames.scores[(frames.scores.metric == "acc") & frames.scores.run.isin(completed.run)]
    scores = scores[scores.task.isin(SUITES[suite]) & scores.value.notna() & (scores.stderr > 0)]
    if scores.empty:
        return None
    near = scores.value - scores.task.map(dict(zip(SUITES[suite], CHANCE, strict=True))) / 100
    averages = cell_numbers(frames, suite).query("column == 'Avg.'").dropna(subset="mean")
    blocks = [same["mean"] for _, same in averages.groupby(["size", "learning_rate"])]
    gaps = [means.max() - means.min() for means in blocks if len(means) > 1]
    errors = scores.groupby("task").stderr.max() * 100
    return {
        "sizes": sorted({int(n) for n in scores.n.dropna()}),
        "least_error": scores.stderr.min() * 100,
        "most_error": scores.stderr.max() * 100,
        "near": int((near.abs() <= 2 * scores.stderr).sum()),
        "scores": len(scores),
        "gap": max(gaps) if gaps else None,
        "error": math.sqrt(2 * (errors**2).sum()) / len(errors),
    }


def _ranking(suite: str, found: dict[str, Any] | None) -> list[str]:
    if not found or found["gap"] is None:
        return []
    within = found["gap"] <= 2 * found["error"]
    verdict = "less than" if within else "more than"
    end = "they rank no placement." if within else "so few seeds cannot tell whether that is due to the placement."
    return [
        f"Scores (suite {suite}): at one learning rate the Avg. of two placements differ by at most "
        f"{found['gap']:.1f} points, {verdict} two standard errors of such a difference "
        f"({2 * found['error']:.1f} points); {end}"
    ]


def verdict(frames: Frames, numbers: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """What the records say: headings with sentences; `numbers` are those of the stability table."""
    runs = frames.pretrained
    counts = ", ".join(f"{n} {status}" for status, n in sorted(runs.status.value_counts().items()))
    said: list[tuple[str, list[str]]] = [(f"{plural(len(runs), 'pretraining run')}: {counts}.", [])]
    for rate in frames.learning_rates:
        fate = f"Learning rate {rate:g}: {_fate(runs[runs.learning_rate == rate])}"
        here = numbers[numbers.learning_rate == rate]
        said.append((fate, _loss(frames, rate) + _growth(frames, rate) + _precision(frames, here)))
    return said + [(sentence, []) for suite in suites(frames) for sentence in _ranking(suite, noise(frames, suite))]
