"""Numbers, learning rates and steps as words, for captions, tables and verdicts."""

import math

import pandas as pd

from periln.eval.records.derived import at_edge


def rate_text(rate: float) -> str:
    """A learning rate as it is written everywhere."""
    return f"learning rate {rate:g}"


def recorded_steps(data: pd.DataFrame) -> str:
    """The steps that were recorded: `step 0`, `steps 0 to 200, 5 recorded`."""
    steps = sorted({int(step) for step in data.step})
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}, {len(steps)} recorded"


def first_steps(data: pd.DataFrame) -> pd.Series:
    """The first recorded step of every run that also has a later one."""
    steps = data.groupby("run").step.agg(["min", "max"])
    return steps["min"][steps["min"] < steps["max"]]


def first_and_last(data: pd.DataFrame) -> str:
    """Which steps `at_edge` means."""
    first, last = first_steps(data), at_edge(data, True).step
    if first.empty:
        return f"One step is recorded of each ({listed(last)}): there is no earlier one to compare."
    start = "Initialization is" if (first <= 1).all() else "Nothing is recorded of initialization, the first is"
    return (
        f"{start} step {listed(first)}; the end is each run's last recorded step ({listed(last)}), for a run that "
        "diverged the one at which it was stopped."
    )


def listed(steps: pd.Series) -> str:
    """Steps by number; by their range where there are many."""
    values = sorted({int(step) for step in steps})
    return ", ".join(map(str, values)) if len(values) < 6 else f"{values[0]} to {values[-1]}"


def number(x: float) -> str:
    """Three significant digits or the whole number, in the form that reads best: `0.0123`, `51,234`, `1.04e+05`."""
    if not math.isfinite(x):
        return "not finite"
    return f"{x:.3g}" if abs(x) < 1e3 else f"{x:,.0f}" if abs(x) < 1e5 else f"{x:.2e}"
