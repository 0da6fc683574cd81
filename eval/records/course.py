"""The course of a run as its records tell it: what was read, and what happened at which step.

In the records layers are counted from 1 (0 is the embedding); in a module's name, `model.layers.3.mlp`, from 0.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.records.frames import read_layers
from periln.eval.records.words import number
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, read_json
from periln.runkit.number_format import FP16
from periln.runkit.spikes import rules_of, spike_steps

TENSORS = {  # in the order in which a sublayer makes them
    "branch": "the module's output (before any output norm)",
    "residual_add": "the residual sum",
    "stream": "the stream after the residual sum",
}
SUBLAYERS = {"embedding": 0, "attn": 1, "mlp": 2}
_COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]
_MODULE = re.compile(r"layers\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class RunCourse:
    """What a run folder tells about its course. `rows` are per-layer statistics, those of the flight recorder first."""

    path: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    rows: pd.DataFrame
    flight: bool  # a flight recorder's tables exist
    divergence: dict[str, Any]


def _events(path: Path) -> list[dict[str, Any]]:
    file = path / "flight" / "events.jsonl"
    found = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            break  # cut by a crash
        if isinstance(event, dict) and isinstance(event.get("step"), int):
            found.append(event)
    return sorted(found, key=lambda event: event["step"])


def read_course(path: Path) -> RunCourse:
    """The records of one run folder.

    Raises:
        UserError: the folder is missing, is not a run folder, or a file is damaged; names the path.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is {'not a folder' if path.exists() else 'missing'}: give a run folder")
    run = RunFolder(path)
    if not any((path / name).exists() for name in ("metrics.jsonl", "summary.json", "flight", "recipe.yaml")):
        raise UsageError(f"{path} is not a run folder: it has neither recipe.yaml nor metrics.jsonl nor flight/")
    flight = list(read_layers("", path / "flight"))
    rows = [*flight, *read_layers("", path / "layers")]
    table = pd.concat(rows, ignore_index=True)[_COLUMNS] if rows else pd.DataFrame(columns=_COLUMNS)
    table = table.drop_duplicates(_COLUMNS[:-1]).assign(value=table.value.astype(float))
    dump = path / "divergence.json"
    return RunCourse(
        path=path,
        recipe=run.recipe if (path / "recipe.yaml").exists() else {},
        summary=run.summary,
        metrics=run.metrics(),
        events=_events(path),
        rows=table.sort_values("step", kind="stable"),
        flight=bool(flight),
        divergence=read_json(dump) if dump.exists() else {},
    )


# --- words ---------------------------------------------------------------------------------------------------


def place_text(layer: int, sublayer: str, tensor: str = "") -> str:
    """`layer 4, MLP: the residual sum`."""
    where = "the embedding" if int(layer) == 0 else f"layer {int(layer)}"
    part = {"attn": ", attention", "mlp": ", MLP", "final": ", final norm"}.get(sublayer, "")
    return f"{where}{part}" + (f": {TENSORS.get(tensor, tensor)}" if tensor else "")


def module_text(module: str) -> str:
    """A module's name with the layer it belongs to, counted from 1."""
    found = _MODULE.search(module)
    if not found:
        return module
    part = "MLP" if found[2].startswith("mlp") else "attention" if "att" in found[2] else found[2]
    return f"{module} (layer {int(found[1]) + 1}, {part})"


def against_limit(value: float) -> str:
    """A largest |x| compared with FP16's largest number: `51,234 (0.4 bits below 65504)`."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite"
    if value <= 0:
        return "0"
    bits = FP16.headroom(value)
    return (
        f"{number(value)} ({bits:.1f} bits below {FP16.limit})"
        if bits >= 0
        else f"{number(value)} (above {FP16.limit})"
    )


def steps_text(steps: Sequence[int]) -> str:
    """`step 4`, `steps 4 to 9` or `steps 4, 7, 9`."""
    steps = sorted(set(steps))
    if len(steps) == 1:
        return f"step {steps[0]}"
    if steps == list(range(steps[0], steps[-1] + 1)) or len(steps) > 6:
        gap = "" if len(steps) == steps[-1] - steps[0] + 1 else f" ({len(steps)} of them)"
        return f"steps {steps[0]} to {steps[-1]}{gap}"
    return f"steps {', '.join(map(str, steps))}"


# --- what came first -----------------------------------------------------------------------------------------


def happenings(records: RunCourse) -> list[dict[str, Any]]:
    """Events of the recorder, and what only metrics.jsonl tells, by step."""
    found = list(records.events)
    known = {(event["step"], event.get("kind")) for event in found}
    norms = [record.get("grad_norm") for record in records.metrics]
    spiked = set(spike_steps([record["step"] for record in records.metrics], norms, rules_of(records.recipe)))
    for record in records.metrics:
        step, skipped = record["step"], record.get("skip_kind")
        if skipped and (step, "skip") not in known:
            module = record.get("skip_module")
            found.append({"step": step, "kind": "skip", "skip_kind": skipped, "module": module})
        if step in spiked and (step, "spike") not in known:
            norm = record.get("grad_norm")
            found.append({"step": step, "kind": "spike", "reason": norm and f"gradient norm {norm:.4g}"})
        if record.get("loss") is None and not skipped:
            found.append({"step": step, "kind": "loss", "reason": "the loss was not finite"})
    if records.summary.get("status") == "diverged" and "diverged" not in {e.get("kind") for e in found}:
        last = records.metrics[-1]["step"] if records.metrics else records.summary.get("step") or 0
        found.append({"step": last, "kind": "diverged", "reason": records.summary.get("reason")})
    return sorted(found, key=lambda event: event["step"])


def is_probe(event: dict[str, Any]) -> bool:
    return event.get("kind") == "skip" and event.get("skip_kind") == "probe"


def event_text(event: dict[str, Any]) -> str:
    kind, reason = event.get("kind"), event.get("reason")
    skipped = str(event.get("skip_kind"))
    if kind == "skip":
        why = {
            "forward": "the forward pass was not finite (neither was the loss)",
            "backward": "a gradient was not finite at a loss scale that had worked before, the loss was finite",
        }.get(skipped, f"kind {skipped}")
        module = event.get("module")
        named = f"; the first module whose output was not finite: {module_text(module)}" if module else ""
        return f"step {event['step']} was skipped: {why}{named}"
    if kind == "spike":
        return f"a gradient spike at step {event['step']}" + (f": {reason}" if reason else "")
    if kind == "diverged":
        return f"the run was stopped as diverged after step {event['step']}" + (f": {reason}" if reason else "")
    return f"step {event['step']}: {reason or kind}"
