"""A trained cell's result: all that verdicts and figures read of it, a few kilobytes."""

import math
from statistics import fmean
from typing import Any

import pandas as pd

from periln.eval.records.frames import read_layers
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, json_number, read_json, write_json
from periln.runkit.number_format import FP16
from periln.runkit.recipes import flatten
from periln.runkit.spikes import count_spikes, rules_of
from periln.runkit.studies import ENDED, Study

POINTS = 40  # of a course, after thinning
INSIDE = ("E1", "E4")  # groups whose checkpoints are opened
TENSORS = ("stream", "residual_add", "branch")
GOLD = "gold_bits_per_byte"


def thinned(values: list[tuple[int, float | None]], points: int = POINTS) -> list[list[float]]:
    """[step, mean of the finite values] of at most `points` stretches of equal length."""
    size, found = max(1, -(-len(values) // points)), []
    for start in range(0, len(values), size):
        some = [value for _, value in values[start : start + size] if value is not None]
        if some:
            found.append([values[start][0], round(fmean(some), 5)])
    return found


def _digits(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


def by_layer(rows: pd.DataFrame, tensor: str, stat: str, sublayers: tuple[str, ...]) -> dict[str, list[float | None]]:
    """One statistic by layer at the first, middle and last recorded step; the mean over `sublayers`."""
    of = rows[(rows.tensor == tensor) & (rows.stat == stat) & rows.sublayer.isin(sublayers)]
    steps = sorted(of.step.unique())
    if not steps:
        return {}
    chosen = {0: steps[0], 1: steps[len(steps) // 2], 2: steps[-1]}
    table = of.groupby(["step", "layer"]).value.mean()
    return {str(int(step)): [_digits(x) for x in table.loc[step].sort_index()] for step in chosen.values()}


def _headroom(rows: pd.DataFrame) -> dict[str, float | None]:
    """Fewest bits below FP16's largest number at the recorded steps, by tensor; None: not finite."""
    found = {}
    for tensor in TENSORS:
        values = rows[(rows.tensor == tensor) & (rows.stat == "max_abs")].value.astype(float)
        if len(values):
            largest = values.fillna(math.inf).max()
            found[tensor] = round(FP16.headroom(largest), 3) if math.isfinite(largest) else None
    return found


def read_cell(study: Study, cell: dict[str, Any]) -> dict[str, Any]:
    """The result of a cell whose run has ended.

    Raises:
        UserError: it has not.
    """
    run = RunFolder(study.run_path(cell["name"]))
    summary, metrics = run.summary, run.metrics()
    if summary.get("status") not in ENDED or not metrics:
        raise UserError(f"cell {cell['name']} has not ended ({summary.get('status') or 'not begun'}): run it first")
    recipe, environment = run.recipe, read_json(run.path / "environment.json")
    tables = list(read_layers("", run.path / "layers"))
    rows = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["tensor", "stat", "sublayer"])
    diverged = summary["status"] == "diverged"
    heldout = [[r["step"] + 1, round(r["heldout_loss"], 5)] for r in metrics if r.get("heldout_loss") is not None]
    skips = [r["skip_kind"] for r in metrics if r.get("skip_kind")]
    spikes, early = count_spikes((r["grad_norm"] for r in metrics), recipe["steps"], rules_of(recipe))
    headroom = _headroom(rows)
    return {
        "cell": cell["name"],
        "plan": study.plan_hash,
        **{name: cell[name] for name in ("group", "variant", "block", "seed", "size")},
        "tokens": metrics[-1]["tokens"],
        "rate": flatten(recipe)["optimizer.learning_rate"],
        "status": summary["status"],
        "reason": summary.get("reason"),
        "steps": len(metrics),
        "planned_steps": recipe["steps"],
        "parameters": summary.get("parameters"),
        "parameters_non_embedding": summary.get("parameters_non_embedding"),
        "data": recipe.get("data_fingerprint"),
        "commit": environment.get("commit"),
        "uncommitted_changes": environment.get("uncommitted_changes"),
        "torch": (environment.get("versions") or {}).get("torch"),
        "seconds": round(sum(r["step_seconds"] for r in metrics), 1),
        "heldout_loss": heldout[-1][1] if heldout and not diverged else None,
        "heldout": heldout,
        "initial_loss": _digits(metrics[0]["loss"]) if metrics[0]["loss"] is not None else None,
        "loss": thinned([(r["step"], r["loss"]) for r in metrics]),
        "grad_norm": thinned([(r["step"], r["grad_norm"]) for r in metrics], POINTS // 2),
        "spikes": spikes,
        "spikes_first_tenth": early,
        "skips": {kind: skips.count(kind) for kind in sorted(set(skips))},
        "headroom": headroom,
        "overflow": any(bits is None or bits <= 0 for bits in headroom.values()) or "forward" in skips,
        "variance": by_layer(rows, "stream", "variance", ("embedding", "mlp")),
        "gradient": by_layer(rows[rows.layer > 0] if len(rows) else rows, "gradient", "norm", ("layer",)),
        "gamma": by_layer(rows, "output_norm_gamma", "mean", ("attn", "mlp")),
    }


def gold_bits(run: RunFolder) -> dict[str, float] | None:
    """Bits a byte of the right answer by task, and their mean; None where they were not measured."""
    found: dict[str, float] = {}
    for file in run.evaluations():
        for row in file.get("results") or []:
            if row.get("metric") == GOLD and row.get("value") is not None:
                found[row["task"]] = round(row["value"], 5)
    return found | {"mean": round(fmean(found.values()), 5)} if found else None


def measure(study: Study, name: str) -> None:
    """Write a cell's cell.json.

    Raises:
        UserError: no such cell, or it has not ended.
    """
    cell = next((cell for cell in study.cells if cell["name"] == name), None)
    if cell is None:
        raise UserError(f"{study.path / 'plan.yaml'} has no cell {name!r}")
    run = RunFolder(study.run_path(name))
    result = read_cell(study, cell)
    if cell["group"] in INSIDE and result["status"] == "completed":
        from periln.eval.study.inside import look_inside  # torch: seconds that the other cells need not spend

        result["inside"] = look_inside(run.path, study.path / study.plan["data"]["path"] / "heldout.jsonl")
    if (gold := gold_bits(run)) is not None:
        result[GOLD] = gold
    write_json(run.path / "cell.json", json_number(result))
