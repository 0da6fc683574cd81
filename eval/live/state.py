"""What the live page shows, as JSON: a table of runs, their curves, and the map of headroom over layer and step."""

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.figures.plots import MOST_STEPS, Plot, every_of, keys_of, numbers, packed, spread, step_lines, style_of
from periln.eval.figures.selection import View, view_of
from periln.eval.live.followed import Followed
from periln.eval.records.frames import load
from periln.runkit.errors import UserError

SHARE = 0.05  # of a core at most: the page waits accordingly, and trainings keep their processors
READING_SECONDS = 1.0  # of a processor, for an answer: what many runs have recorded by layer is read in several
FRESH_SECONDS = 1.0  # a state as old as this is given once more
MOST_MARKS = 200  # of skipped steps of a run
SKIPPED = ("checkpoints", "trainer_state", "eval", "layers", "flight", "figures", "sft", "data", "logs")
CURVES = ("loss", "grad_norm", "loss_scale")
NAMES = ("training loss (nats a token)", "gradient norm", "loss scale")


class Watch:
    """The runs under a folder, as they are written; `state` may be asked for from several threads."""

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()
        self._runs: dict[str, Followed] = {}
        self._found: dict[str, float] = {}
        self._view: View | None = None
        self._made: tuple[float, str] = (-math.inf, "")

    def state(self) -> str:
        """The state as JSON: name, runs (rows of the table, those that run first), left (seconds), behind (runs whose
        tables of layers are still being read), pause (seconds before the next question), and what `plots.packed` gives.
        """
        with self._lock:
            if time.monotonic() - self._made[0] > FRESH_SECONDS:
                self._made = (time.monotonic(), self._state())
            return self._made[1]

    def _state(self) -> str:
        began = time.thread_time()
        self._find()
        for run in self._runs.values():
            run.read_records()
        reading = time.thread_time()
        for run in sorted(self._runs.values(), key=lambda run: run.status != "running"):
            run.read_layers(reading + READING_SECONDS)
        began += time.thread_time() - reading  # each table is read once: that does not count
        plots: dict[str, Plot] = {}
        rows = [self._row(name, run) for name, run in self._runs.items()]
        if self._view is not None and (view := self._now()) is not None:
            plots = {"curves": self._curves(view), "headroom": self._headroom(view)}
            colours = {run.run: style_of(view, run)["c"] for _, run in view.runs.iterrows()}
            rows = [row | {"colour": colours.get(row["name"])} for row in rows]
        rows.sort(key=lambda row: row["status"] != "running")
        rows += [{"name": name, "status": "waiting"} for name in self._waiting()]
        left = [row["left"] for row in rows if row.get("left") is not None and row["status"] == "running"]
        head = {"name": self.root.resolve().name, "runs": rows, "left": max(left) if left else None}
        head["behind"] = sum(run.behind for run in self._runs.values())
        head["pause"] = round((1 / SHARE - 1) * (time.thread_time() - began), 2)
        return json.dumps(head, allow_nan=False)[:-1] + ", " + packed({k: p for k, p in plots.items() if p})[1:]

    # --- the runs ------------------------------------------------------------------------------------------------
    def _find(self) -> None:
        """Look for new run folders; recipes are read again only where one is new or was changed."""
        found: dict[str, float] = {}
        for here, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in SKIPPED)
            if "recipe.yaml" in files:
                path = Path(here)
                found[path.relative_to(self.root).as_posix()] = (path / "recipe.yaml").stat().st_mtime
        if found == self._found:
            return
        try:
            self._view = view_of(load(self.root, measurements=False))
        except UserError:  # none has begun, or a recipe is just being written
            self._view = None
            self._runs = {}
            return
        self._found = found
        names = list(self._view.runs.run)
        self._runs = {name: self._runs.get(name) or Followed(self.root / name) for name in names}

    def _now(self) -> View | None:
        """The view with every run's status of now; None where none has a record."""
        assert self._view is not None
        runs = self._view.runs
        runs = runs.assign(status=[self._runs[name].status for name in runs.run])
        begun = [bool(self._runs[name].records) for name in runs.run]
        return self._view.of(runs[begun]) if any(begun) else None

    def _waiting(self) -> list[str]:
        """The cells of a sweep or a study that have not begun: recipes without a run folder."""
        recipes = sorted((self.root / "recipes").glob("*.yaml"))
        begun = {Path(name).name for name in self._runs}
        return [file.stem for file in recipes if file.stem not in begun and file.stem != "sft"]

    def _row(self, name: str, run: Followed) -> dict[str, Any]:
        recipe = self._view.frames.recipes[name] if self._view is not None else {}
        steps, seconds = recipe.get("steps"), run.seconds_a_step
        last = run.records[-1] if run.records else {}
        bits, going = None if run.behind else run.least_bits(), run.status == "running"
        left = (steps - run.step) * seconds if isinstance(steps, int) and seconds is not None and going else None
        return {
            "name": name,
            "status": run.status,
            "reason": str(run.summary.get("reason") or ""),
            "step": run.step,
            "steps": steps,
            "loss": _finite(last.get("loss")),
            "skips": run.skips(),
            "bits": None if bits is None else max(bits, -1.0) if math.isfinite(bits) else -1.0,
            "seconds": seconds,
            "left": left,
            "quiet": run.quiet_seconds if going else None,
        }

    # --- the plots -----------------------------------------------------------------------------------------------
    def _curves(self, view: View) -> Plot:
        frames = [pd.DataFrame(self._runs[name].records).assign(run=name) for name in view.runs.run]
        metrics = pd.concat(frames, ignore_index=True)
        every, panels, lines = every_of(metrics.step), [], []
        for i, (key, title) in enumerate(zip(CURVES, NAMES, strict=True)):
            values = pd.to_numeric(metrics[key], errors="coerce")
            if not values.notna().any():
                continue
            how = "largest" if key == "grad_norm" else "mean"
            panels.append({"title": "", "y": title + (f", {how} of {every} steps" if every > 1 else ""), "log": i > 0})
            data = pd.DataFrame({"run": metrics.run, "x": metrics.step.astype(float), "y": values})
            lines += step_lines(view, data, len(panels) - 1, largest=key == "grad_norm")
        for line in lines:
            if line["p"] == 0:  # skipped steps are marked in the first panel
                skipped = [(r["step"], r["skip_kind"]) for r in self._runs[line["run"]].records if r["skip_kind"]]
                line["m"] = [[step, f"skipped: {kind}"] for step, kind in skipped[-MOST_MARKS:]]
        return {"kind": "lines", "x": "step", "steps": True, "panels": panels, "lines": lines}

    def _headroom(self, view: View) -> Plot:
        maps = []
        for _, run in view.runs.iterrows():
            cells = self._runs[run.run].bits
            if not cells or self._runs[run.run].behind:
                continue
            worst = min(cells, key=lambda step: min(cells[step].values(), default=math.inf))
            steps = sorted({*spread(sorted(cells), 2 * MOST_STEPS), worst})
            depths = sorted({depth for step in steps for depth in cells[step]})
            values = [numbers((max(cells[step].get(depth, math.nan), -1.0) for step in steps), 3) for depth in depths]
            maps.append(
                {"x": numbers(steps, 9), "y": depths, "v": values, "k": keys_of(view, run)} | style_of(view, run)
            )
        return {"kind": "map", "name": "bits left", "most": 16, "maps": maps} if maps else {}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
