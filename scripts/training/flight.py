"""The flight recorder: the last steps' layer statistics, kept in memory and written when something happens.

    RUN/flight/events.jsonl           a line for each event: step, kind (skip, spike, diverged), skip_kind, module,
                                      reason, file
    RUN/flight/step_XXXXXXXX.parquet  the rows of layers/ (mean |x|, variance, max |x|; the gradient's norm by
                                      sublayer) for the `steps` steps up to and including the one that names it

A series of events is not a series of copies: while the last file is younger than `steps` steps, events wait and share
the next file. What waits is written with the next checkpoint at the latest, and when the run ends. Beyond `files` files
the oldest goes, and its events have no file any more.

The memory is not in the checkpoint: after a resume it fills anew, and a file written within its first `steps` steps has
fewer of them. Events and files of steps that are done again are dropped, as their records are.
"""

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from periln.runkit.folder import RunFolder, write_text
from periln.scripts.recipe import Recipe
from periln.scripts.training.engine import Engine
from periln.scripts.training.layer_stats import Activations, LayerStats, drop_rows, gradient_places, step_of, write_rows


class FlightRecorder:
    """One run's recorder: `keep` and `note` each step, `write` at checkpoints, all on every rank."""

    def __init__(self, recipe: Recipe, run: RunFolder, engine: Engine, stats: LayerStats):
        self.rules, self.spikes, self.engine, self.stats = recipe.flight, recipe.spikes, engine, stats
        self.folder = run.path / "flight"
        self.events_path = self.folder / "events.jsonl"
        # Twice as many as are written, so that the first of the events that share a file has its past there too.
        self._steps: deque[tuple[int, Activations, Tensor]] = deque(maxlen=2 * self.rules.steps)
        self._parameters = [name for name, p in engine.parameters() if p.requires_grad]
        self._events: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []
        self._written = -self.rules.steps  # the step of the newest file

    # --- every step --------------------------------------------------------------------------------------
    def keep(self, step: int, seen: Activations, gradient_norms: Tensor) -> None:
        """Remember a step. `gradient_norms` (parameters): unscaled, before clipping; on the device, as `seen`."""
        self._steps.append((step, seen, gradient_norms))

    def note(self, record: dict[str, Any]) -> None:
        """Enter the step's record: an event if it was skipped or is a spike."""
        step = record["step"]
        if record["found_inf"]:
            self._event(step, "skip", skip_kind=record["skip_kind"], module=record["skip_module"])
        if record["spike"]:
            rule = f"{self.spikes.sigmas:g} sigma above the mean of the {self.spikes.window} steps before"
            self._event(step, "spike", reason=f"gradient norm {record['grad_norm']:.4g}, more than {rule}")
        if self._waiting and step - self._written >= self.rules.steps:
            self.write()

    def diverged(self, step: int, reason: str) -> None:
        """The run ends after `step`."""
        self._event(step, "diverged", reason=reason)
        self.write()

    def _event(self, step: int, kind: str, **more: Any) -> None:
        event = {"step": step, "kind": kind, "skip_kind": None, "module": None, "reason": None, "file": None}
        self._waiting.append(event | more)

    # --- files -------------------------------------------------------------------------------------------
    def resume(self, step: int) -> None:
        """Drop what was written of steps from `step` on."""
        if self.engine.is_main and self.events_path.exists():
            lines = self.events_path.read_text().splitlines()
            self._events = [event for event in map(json.loads, lines) if event["step"] < step]
            drop_rows(self.folder, step)
            self._write_events()
        newest = max((step_of(event["file"]) for event in self._events if event["file"]), default=self._written)
        self._written = self.engine.gather(newest)[0]

    def write(self) -> None:
        """Write what waits, if anything does; a collective call."""
        if not self._waiting:
            return
        last = self._waiting[-1]["step"]
        kept = [entry for entry in self._steps if last - self.rules.steps < entry[0] <= last]
        rows = list(self._rows(kept))
        self._written = last
        if self.engine.is_main:
            name = f"step_{last:08d}.parquet"
            write_rows(self.folder / name, rows)
            old = self._files()[: -self.rules.files]
            self._events += [event | {"file": name} for event in self._waiting]
            gone = {file.name for file in old}
            self._events = [e | {"file": None} if e["file"] in gone else e for e in self._events]
            self._write_events()
            for file in old:
                file.unlink()
        self._waiting.clear()

    def _files(self) -> list:
        return sorted(self.folder.glob("step_*.parquet"))

    def _write_events(self) -> None:
        write_text(self.events_path, "".join(json.dumps(event, allow_nan=False) + "\n" for event in self._events))

    def _rows(self, kept: list[tuple[int, Activations, Tensor]]) -> Iterator[tuple]:
        steps, seen = [step for step, _, _ in kept], [activations for _, activations, _ in kept]
        yield from self.stats.activation_rows(steps, seen)
        for step, _, norms in kept:
            squares: dict[tuple[int, str], float] = {}
            for name, norm in zip(self._parameters, norms.tolist(), strict=True):
                for place in gradient_places(name):
                    squares[place] = squares.get(place, 0.0) + norm**2
            for place, square in squares.items():
                yield step, *place, "gradient", "norm", square**0.5
