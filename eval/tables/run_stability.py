"""The table of stability in the report: final loss, gradient spikes, skipped steps and FP16 headroom of each run."""

import math
from collections.abc import Sequence
from dataclasses import astuple

import pandas as pd

from periln.eval.records.derived import final_loss, largest, spikes
from periln.eval.records.frames import Frames
from periln.eval.tables.report_tables import MISSING
from periln.eval.text_table import Table
from periln.runkit.number_format import FP16
from periln.runkit.spikes import LEAST, Spikes, rules_of

SPIKES_NOTE = (
    "Final loss: mean of the finite training losses in the last tenth of the recorded steps. Gradient spike: a step "
    "whose gradient norm, before clipping, exceeds the mean of the {window} steps before it (all there are, at least "
    "{least}) by {sigmas:g} of their standard deviations"
)
SKIPS_NOTE = (
    "Skipped steps, by kind: forward: the loss itself was not finite; probe: the gradient overflowed at a loss "
    "scale not yet proven; backward: it overflowed at a scale that had worked before."
)
HEADROOM_NOTE = (
    f"Headroom: log2({FP16.limit} / max |x|) over stream, residual sums and module outputs at the steps at which layer "
    "statistics were recorded; other steps were not measured."
)
STREAM, MODULES = ("stream",), ("residual_add", "branch")


def _place(row: pd.Series) -> str:
    where = "embedding" if row.layer == 0 else f"layer {int(row.layer)} {row.sublayer}"
    return f"{row.tensor}, {where}, step {int(row.step)}"


def status_text(run: pd.Series) -> str:
    """`completed`, or another status and its step."""
    if run.status == "completed" or pd.isna(run.step):
        return str(run.status)
    return f"{run.status} at step {int(run.step)}"


def _skips(metrics: pd.DataFrame) -> dict[str, int]:
    return {str(kind): int(n) for kind, n in sorted(metrics.skip_kind.dropna().value_counts().items())}


def run_numbers(frames: Frames, run: pd.Series) -> dict:
    """The stability of one run as numbers; NaN or None for what it did not record."""
    metrics, layers = frames.metrics[frames.metrics.run == run.run], frames.layers[frames.layers.run == run.run]
    stream, overall = largest(layers, STREAM), largest(layers, STREAM + MODULES)
    return {
        "run": run.run,
        "learning_rate": run.learning_rate,
        "placement": run.placement,
        "seed": run.seed,
        "status": run.status,
        "measured_steps": len(metrics),
        "final_loss": final_loss(metrics),
        "spikes": spikes(metrics, rules_of(frames.recipes[run.run])),
        "skips": _skips(metrics),
        "max_abs_stream": math.nan if stream is None else float(stream.value),
        "stream_recorded": stream is not None,
        "headroom_bits": math.nan if overall is None else FP16.headroom(float(overall.value)),
        "headroom_at": None if overall is None else _place(overall),
    }


def spikes_note(frames: Frames) -> str:
    """What a final loss and a gradient spike are, by the rules of the runs' own recipes."""
    by_rule: dict[tuple, list[str]] = {}
    for run in frames.pretrained.run:
        by_rule.setdefault(astuple(rules_of(frames.recipes[run])), []).append(run)
    first = Spikes(*next(iter(by_rule), astuple(Spikes())))
    note = SPIKES_NOTE.format(sigmas=first.sigmas, window=first.window, least=max(1, min(LEAST, first.window)))
    others = [
        f"{sigmas:g} of {window} steps in {', '.join(runs)}" for (sigmas, window), runs in list(by_rule.items())[1:]
    ]
    return note + (f"; by their recipes {'; '.join(others)}." if others else ".")


def _first(steps: Sequence[int], shown: int = 3) -> str:
    more = ", ..." if len(steps) > shown else ""
    return f"{len(steps)} (step {', '.join(map(str, steps[:shown]))}{more})" if steps else "0"


def _stability_row(run: pd.Series, numbers: dict) -> dict[str, str]:
    measured, skips, peak = numbers["measured_steps"], numbers["skips"], numbers["max_abs_stream"]
    by_kind = f" ({', '.join(f'{n} {kind}' for kind, n in skips.items())})" if skips else ""
    bits, place = numbers["headroom_bits"], numbers["headroom_at"]
    left = f"{bits:.1f} ({place})" if math.isfinite(bits) else f"overflow ({place})"
    finite_peak = f"{peak:,.1f}" if math.isfinite(peak) else "not finite"
    loss = f"{numbers['final_loss']:.3f}" if math.isfinite(numbers["final_loss"]) else "not finite"
    return {
        "block": f"learning rate {run.learning_rate:g}",
        "placement": run.placement,
        "seed": MISSING if pd.isna(run.seed) else str(run.seed),
        "status": status_text(run),
        "final loss": loss if measured else MISSING,
        "gradient spikes": _first(numbers["spikes"]) if measured else MISSING,
        "skipped steps": f"{sum(skips.values())}{by_kind}" if measured else MISSING,
        "max |x|, stream": finite_peak if numbers["stream_recorded"] else MISSING,
        "least headroom, bits": MISSING if place is None else left,
    }


def stability(frames: Frames) -> Table:
    """A row a pretraining run: status, final loss, gradient spikes, skipped steps, and FP16 headroom."""
    runs = [run for _, run in frames.pretrained.iterrows()]
    numbers = [run_numbers(frames, run) for run in runs]
    text = pd.DataFrame([_stability_row(run, n) for run, n in zip(runs, numbers, strict=True)])
    return Table("Stability", text, pd.DataFrame(numbers), (spikes_note(frames), SKIPS_NOTE, HEADROOM_NOTE), keys=2)
