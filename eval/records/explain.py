"""What happened in a run, in words: what came first, where, and how far it spread.

Read from the run folder alone: the flight recorder (`flight/`), the layer statistics (`layers/`), `metrics.jsonl`,
`divergence.json` and `summary.json`. What the records do not tell is reported as unknown.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.records.course import (
    SUBLAYERS,
    TENSORS,
    RunCourse,
    against_limit,
    event_text,
    happenings,
    is_probe,
    place_text,
    read_course,
    steps_text,
)
from periln.eval.records.words import number
from periln.runkit.number_format import FP16
from periln.runkit.placements import placement_name

GROWN = 10.0  # the factor from which a value counts as grown


def _head(records: RunCourse) -> str:
    recipe, summary = records.recipe, records.summary
    rate = (recipe.get("optimizer") or {}).get("learning_rate")
    who = [placement_name(recipe["model"])] if recipe.get("model") else []
    who += [f"learning rate {rate:g}"] if isinstance(rate, (int, float)) else []
    who += [f"seed {recipe['seed']}"] if recipe.get("seed") is not None else []
    status = summary.get("status", "no status recorded")
    step, steps = summary.get("step"), recipe.get("steps")
    when = f" at step {step}" if step is not None else ""
    of = f" of {steps}" if steps and step is not None else ""
    reason = summary.get("reason") or records.divergence.get("reason")
    why = f": {reason}" if reason else ""
    return f"{records.path.name}" + (f" ({', '.join(who)})" if who else "") + f": {status}{when}{of}{why}."


def _probes(happened: list[dict[str, Any]]) -> list[str]:
    steps = [event["step"] for event in happened if is_probe(event)]
    if not steps:
        return []
    return [
        f"Not counted: {len(steps)} skipped step{'s' if len(steps) > 1 else ''} ({steps_text(steps)}) in which the "
        "loss scale was tried out and halved; the loss was finite."
    ]


def _turn(metrics: list[dict[str, Any]], window: int = 16) -> list[str]:
    """Where the loss stopped falling, if it rose again."""
    finite = [(r["step"], r["loss"]) for r in metrics if isinstance(r.get("loss"), (int, float))]
    if len(finite) < 2 * window:
        return []
    losses = [loss for _, loss in finite]
    means = [sum(losses[i : i + window]) / window for i in range(len(losses) - window + 1)]
    lowest = min(range(len(means)), key=means.__getitem__)
    rise = means[-1] - means[lowest]
    if rise < 0.3:
        return []
    start, end = finite[lowest + window - 1][0], finite[-1][0]
    return [
        f"The loss: its mean over {window} steps was lowest, {means[lowest]:.3f}, up to step {start}, and had risen to "
        f"{means[-1]:.3f} by step {end}."
    ]


# --- where, and how far --------------------------------------------------------------------------------------


def _ordered(peaks: pd.DataFrame) -> pd.DataFrame:
    """Rows of max |x| in the order in which a forward pass makes the tensors."""
    ranks = {tensor: i for i, tensor in enumerate(TENSORS)}
    keys = peaks.assign(s=peaks.sublayer.map(SUBLAYERS).fillna(9), t=peaks.tensor.map(ranks).fillna(9))
    return keys.sort_values(["step", "layer", "s", "t"], kind="stable")


def _peaks(records: RunCourse) -> pd.DataFrame:
    rows = records.rows
    return _ordered(rows[(rows.stat == "max_abs") & rows.tensor.isin(TENSORS)])


def _overflow(peaks: pd.DataFrame, step: int | None) -> list[str]:
    """The first value that was not finite: where, what it was before, and how it spread."""
    bad = peaks[~peaks.value.map(math.isfinite)]
    if bad.empty:
        return []
    first = bad.iloc[0]
    gone = ""
    if step is not None and first.step > step:
        gone = f"no value of step {step} that was not finite is recorded; "
    step = int(first.step)
    place = place_text(first.layer, first.sublayer, first.tensor)
    same = peaks[(peaks.layer == first.layer) & (peaks.sublayer == first.sublayer) & (peaks.tensor == first.tensor)]
    said = [
        f"Where: {gone}at step {step}, in the order of the forward pass, the first recorded value that was not finite "
        f"is that of {place}."
    ]
    return [*said, *_history(same, step), *_spread(peaks, step)]


def _history(same: pd.DataFrame, step: int) -> list[str]:
    """The values at one place before it overflowed."""
    before = same[(same.step < step) & same.value.map(math.isfinite)]
    if before.empty:
        return ["Before: no finite value of that place was recorded at an earlier step; how fast it grew is unknown."]
    a, b = before.iloc[0], before.iloc[-1]
    words = f"Before: the largest |x| there was {against_limit(b.value)} at step {int(b.step)}"
    if b.step == step - 1 and 0 < b.value <= FP16.largest:
        words += f", so that it passed {FP16.limit}, {FP16.largest / b.value:.3g} times as much, within one step"
    elif b.step < step - 1:
        words += f" (the last recorded step before; the {step - 1 - int(b.step)} steps between are not recorded)"
    if len(before) > 1 and a.value > 0 and b.value > 0:
        growth = b.value / a.value
        by_step = growth ** (1 / (b.step - a.step))
        words += (
            f". At step {int(a.step)} it was {against_limit(a.value)}: a factor of {growth:.3g} in "
            f"{int(b.step - a.step)} steps, {by_step:.3g} a step"
        )
    return [f"{words}."]


def _layers_text(layers: Sequence[int], deepest: int) -> str:
    found = sorted({int(layer) for layer in layers})
    if not found:
        return "no layer"
    if found[0] == 0:
        rest = _layers_text(found[1:], deepest) if len(found) > 1 else ""
        return f"the embedding and {rest}" if rest else "the embedding"
    if found == list(range(found[0], deepest + 1)):
        return f"layer {found[0]}" + (f" and every layer after it, to {deepest}" if len(found) > 1 else " (the last)")
    if found == list(range(found[0], found[-1] + 1)) and len(found) > 1:
        return f"layers {found[0]} to {found[-1]}"
    return f"layer{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def _spread(peaks: pd.DataFrame, step: int) -> list[str]:
    """Which layers were not finite at which step, from the first such step on; equal steps are listed once."""
    deepest = int(peaks.layer.max())
    told: list[tuple[str, list[int], int]] = []
    for at, of in peaks[peaks.step >= step].groupby("step"):
        lost = of[~of.value.map(math.isfinite)]
        words = _layers_text(list(lost.layer), deepest)
        if told and told[-1][0] == words:
            told[-1][1].append(int(at))
        else:
            told.append((words, [int(at)], lost.layer.nunique()))
    parts = [f"{steps_text(steps)}: {words}" for words, steps, _ in told[:6]]
    more = f"; and {len(told) - 6} further changes" if len(told) > 6 else ""
    most = max(count for _, _, count in told)
    whole = f"Spread: not finite were, at {'; at '.join(parts)}{more}."
    return [f"{whole} At most {most} of {deepest} layers."]


def _largest(peaks: pd.DataFrame, step: int) -> list[str]:
    """Where nothing overflowed in the forward pass: how large it was at that step."""
    at = peaks[peaks.step == step]
    finite = at[at.value.map(math.isfinite)]
    if finite.empty:
        return []
    top = finite.loc[finite.value.idxmax()]
    return [
        f"Forward: at step {step} every recorded value was finite; the largest, in "
        f"{place_text(top.layer, top.sublayer, top.tensor)}, was {against_limit(top.value)}."
    ]


def _gradients(rows: pd.DataFrame, step: int) -> list[str]:
    """The factor by which each sublayer's gradient had grown at a step, relative to the median of the steps before."""
    found = rows[(rows.tensor == "gradient") & (rows.stat == "norm") & rows.sublayer.isin(SUBLAYERS)]
    at, before = found[found.step == step], found[found.step < step]
    if at.empty:
        return []
    lost = at[~at.value.map(math.isfinite)]
    deepest = int(found.layer.max())
    said = []
    if len(lost):
        last = lost.assign(s=lost.sublayer.map(SUBLAYERS)).sort_values(["layer", "s"]).iloc[-1]
        said.append(
            f"Gradient: at step {step} it was not finite in {_layers_text(list(lost.layer), deepest)}; the backward "
            f"pass runs from the last layer to the first and reached {place_text(last.layer, last.sublayer)} first."
        )
    usual = before[before.value.map(math.isfinite)].groupby(["layer", "sublayer"]).value.median()
    grown = []
    for row in at[at.value.map(math.isfinite)].itertuples():
        was = usual.get((row.layer, row.sublayer), 0.0)
        if was > 0:
            grown.append((row.value / was, row, was))
    if grown:
        factor, row, was = max(grown, key=lambda item: item[0])
        count = len({r.layer for f, r, _ in grown if f >= GROWN})
        said.append(
            f"Gradient norm at step {step}: it had grown most in {place_text(row.layer, row.sublayer)}, from "
            f"{number(was)} (median of the recorded steps before) to {number(row.value)}, a factor of {factor:.3g}; in "
            f"{count} of {deepest} layers it had grown {GROWN:g}-fold or more."
        )
    return said


def _growth(peaks: pd.DataFrame, upto: int) -> list[str]:
    """Which values grew most over the recorded steps up to one."""
    of = peaks[(peaks.step <= upto) & peaks.value.map(math.isfinite) & (peaks.value > 0)]
    if of.step.nunique() < 2:
        return []
    start, end = int(of.step.min()), int(of.step.max())
    ends = of[of.step == end].set_index(["layer", "sublayer", "tensor"]).value
    factors = (ends / of[of.step == start].set_index(["layer", "sublayer", "tensor"]).value).dropna()
    if factors.empty:
        return []
    place = factors.idxmax()
    many = sum(1 for factor in factors if factor >= GROWN)
    layers = sorted({int(key[0]) for key, factor in factors.items() if factor >= GROWN})
    where = f", in {_layers_text(layers, int(peaks.layer.max()))}" if layers else ""
    return [
        f"Growth from step {start} to step {end}: most in {place_text(*place)}, to {against_limit(ends[place])}, a "
        f"factor of {factors[place]:.3g}; {many} of {len(factors)} recorded places grew {GROWN:g}-fold or more{where}."
    ]


def _limits(records: RunCourse, step: int | None) -> list[str]:
    """What the records cannot tell."""
    said = []
    if not records.flight:
        steps = sorted({int(s) for s in records.rows.step})
        if not steps:
            said.append(
                "there are no layer statistics, so that no layer can be named (the recipe's `flight` and "
                "`layer_stats_every` make them)"
            )
        elif step is not None and step not in steps:
            before = [s for s in steps if s < step]
            last = f"the last before it is step {before[-1]}" if before else "none was before it"
            said.append(f"there is no flight record; layers/ has no statistics of step {step} ({last})")
        else:
            said.append(f"there is no flight record, layers/ has statistics of {steps_text(steps)} alone")
    if not records.metrics:
        said.append("there is no metrics.jsonl, so that loss, gradient norm and skips are not known")
    return [f"Not known: {'; '.join(said)}."] if said else []


# --- the whole -----------------------------------------------------------------------------------------------


def explain(run: Path) -> str:
    """What happened in a run: a line each for what came first, where, what was there before, and the spread.

    Raises:
        UserError: see `read`.
    """
    records = read_course(Path(run))
    happened = happenings(records)
    real = [event for event in happened if not is_probe(event)]
    lines = [_head(records)]
    peaks = _peaks(records)
    if real:
        lines += _course(records, real, peaks)
    else:
        lines.append(
            "The records show no incident: no skipped step, no spike, no loss that was not finite."
            if records.metrics
            else "No incident is recorded."
        )
        lines += _growth(peaks, int(peaks.step.max())) if len(peaks) else []
        bad = _overflow(peaks, None)
        lines += bad
    lines += _probes(happened)
    lines += _limits(records, real[0]["step"] if real else None)
    return "\n".join(lines)


def _course(records: RunCourse, real: list[dict[str, Any]], peaks: pd.DataFrame) -> list[str]:
    first, rest = real[0], real[1:]
    overflow = next((e for e in real if e.get("kind") == "skip" and e.get("skip_kind") == "forward"), None)
    lost = _overflow(peaks, overflow["step"] if overflow else None)
    lines = [f"First: {event_text(first)}."]
    if first is not overflow:
        lines += _largest(peaks, first["step"]) + _gradients(records.rows, first["step"])
    lines += _turn(records.metrics)
    if overflow and overflow is not first:
        lines.append(f"Overflow: {event_text(overflow)}.")
    lines += lost
    if overflow and not lost:
        known = (
            "the module above is all that is known" if overflow.get("module") else "which module it was is not known"
        )
        lines.append(f"Where: every recorded value was finite at the recorded steps; {known}.")
    bad = peaks.step[~peaks.value.map(math.isfinite)]
    lines += _growth(peaks, int(bad.min()) - 1 if len(bad) else first["step"])
    return lines + _after(rest)


def _after(rest: list[dict[str, Any]]) -> list[str]:
    """What followed the first event, counted by kind."""
    if not rest:
        return []
    names = {"forward": "forward overflow", "backward": "gradient overflow"}
    counts: dict[str, list[int]] = {}
    end = None
    for event in rest:
        if event.get("kind") == "diverged":
            end = event
            continue
        kind = str(event.get("kind"))
        if kind == "skip":
            reason = str(event.get("skip_kind"))
            name = f"skipped for {names.get(reason, reason)}"
        else:
            name = {"spike": "a gradient spike", "loss": "a loss that was not finite"}.get(kind, kind)
        counts.setdefault(name, []).append(event["step"])
    said = [f"{steps_text(steps)}: {name}" for name, steps in counts.items()]
    if end:
        said.append(event_text(end))
    return [f"Then: {'; '.join(said)}."]
