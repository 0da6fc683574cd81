"""Gradient spikes: steps whose gradient norm is far above those of the steps before."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

LEAST = 16  # norms that a window needs before anything counts as a spike


@dataclass
class Spikes:
    """When a gradient norm counts as a spike: `sigmas` standard deviations above the mean of the steps before."""

    sigmas: float = 6.0
    window: int = 128  # steps


class SpikeCounter:
    """Tells for each step whether its gradient norm is a spike, and counts the spikes.

    A spike exceeds the mean of the finite norms among the `rules.window` steps before it (excluding itself) by
    more than `rules.sigmas` of their (population) standard deviations. A window may be shorter than that, early in a
    run, but needs 16 finite norms (`rules.window` if that is less): the run's first steps are when spikes are most
    frequent, and would be lost to a full window. A norm that is not finite (None) is not a spike and enters no
    statistic, but its step takes its place in the window. A spike does enter the windows of the steps after it:
    a run that goes up and stays there has one spike, not a thousand.

    The rule is that of OLMo's SpikeScore (6 sigma, 128 steps) and of the report's tables. Its state
    follows from metrics.jsonl: after a resume, record the earlier steps again.
    """

    def __init__(self, rules: Spikes | None = None):
        self.rules = rules or Spikes()
        self.steps: list[int] = []  # the spikes, as step numbers counted from 0
        self.seen = 0
        self._window: deque[float | None] = deque(maxlen=self.rules.window)

    def record(self, grad_norm: float | None) -> bool:
        """Enter the next step's gradient norm (before clipping); returns whether it is a spike."""
        finite = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None
        before = [norm for norm in self._window if norm is not None]
        spike = False
        if finite is not None and len(before) >= max(1, min(LEAST, self.rules.window)):
            mean = fmean(before)
            deviation = math.sqrt(fmean((norm - mean) ** 2 for norm in before))
            spike = finite > mean + self.rules.sigmas * deviation
        if spike:
            self.steps.append(self.seen)
        self._window.append(finite)
        self.seen += 1
        return spike

    @property
    def total(self) -> int:
        return len(self.steps)

    def within(self, share: float, steps: int) -> int:
        """Spikes in the first `share` of a run of `steps` steps."""
        return sum(step < share * steps for step in self.steps)


def rules_of(recipe: dict[str, Any]) -> Spikes:
    """The rules that a run's recipe states; the defaults for what it leaves out."""
    stated = recipe.get("spikes") or {}
    known = {f.name: stated[f.name] for f in fields(Spikes) if f.name in stated}
    return Spikes(**known)


def spike_steps(steps: Iterable[int], norms: Iterable[float | None], rules: Spikes | None = None) -> list[int]:
    """The steps, by their recorded numbers, whose gradient norms are spikes."""
    counter = SpikeCounter(rules)
    return [int(step) for step, norm in zip(steps, norms, strict=True) if counter.record(norm)]


def count_spikes(grad_norms: Iterable[float | None], steps: int, rules: Spikes | None = None) -> tuple[int, int]:
    """(spikes in the whole run, spikes in the first tenth of its `steps` steps) from the recorded norms."""
    counter = SpikeCounter(rules)
    for norm in grad_norms:
        counter.record(norm)
    return counter.total, counter.within(0.1, steps)
