"""Sweeps: `python -m scripts.sweep plan|run|status|table SWEEP.yaml`.

    plan     what would be run: the cells, their tokens and FLOPs
    run      run the cells that are not finished; stopped at any moment, the same command resumes
    status   where each cell is
    table    loss, spikes, skips and divergence as CSV, Markdown and PNG; --best: the best learning rates

The fields of a sweep file are in scripts/sweep/cells.py; examples in scripts/recipes/sweeps/.
"""

import argparse
import json

from periln.runkit.folder import write_json
from periln.runkit.process import StopRequest, stop_with_parent
from periln.scripts.arguments.sweep import check
from periln.scripts.costs import flops_per_token
from periln.scripts.gpus import GPUS
from periln.scripts.plan.command import short
from periln.scripts.sweep.cells import Sweep, label, load_sweep
from periln.scripts.sweep.run import Way, run_sweep
from periln.scripts.sweep.table import best_rates, describe_best, write_tables


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{x:{w}s}" for x, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def describe_plan(sweep: Sweep, gpu: str = "h100", mfu: float = 0.4) -> str:
    """The cells and what they cost together."""
    rows, flops = [["cell", "steps", "tokens", "status"]], 0.0
    for cell in sweep.cells:
        recipe = cell.recipe
        tokens = recipe.steps * recipe.batch_size * recipe.sequence_length
        flops += tokens * flops_per_token(recipe.model_config(), recipe.sequence_length)
        rows.append([cell.name, f"{recipe.steps:,}", short(tokens), cell.state])
    grid = [f"  {field}: {', '.join(map(label, values))}" for field, values in sweep.grid.items()]
    hours = flops / (GPUS[gpu][0] * mfu) / 3600
    cost = f"{short(flops)} FLOPs, {hours:,.1f} GPU-hours"
    return "\n".join(
        [
            f"{sweep.name}: {len(sweep.cells)} cells in {sweep.path}",
            *grid,
            f"{cost} ({gpu}, MFU {mfu:.0%}; 6N + 12 L H Q T a token, see scripts/costs.py)",
            "",
            _aligned(rows),
        ]
    )


def describe_status(sweep: Sweep) -> str:
    """A line a cell, and how many are in which state."""
    rows = [["cell", "status", "step", "loss", "skipped", ""]]
    states: dict[str, int] = {}
    for cell in sweep.cells:
        state, records = cell.state, cell.run.metrics()
        states[state] = states.get(state, 0) + 1
        last = records[-1] if records else {}
        loss = f"{last['loss']:.4f}" if last.get("loss") is not None else ""
        skipped = str(last["skips_total"]) if last else ""
        reason = str(cell.run.summary.get("reason") or "")
        rows.append([cell.name, state, f"{len(records)}/{cell.recipe.steps}", loss, skipped, reason])
    counts = ", ".join(f"{n} {state}" for state, n in states.items())
    return f"{_aligned(rows)}\n\n{len(sweep.cells)} cells: {counts}"


def main(args: argparse.Namespace) -> None:
    check(args)
    sweep = load_sweep(args.sweep, args.runs)
    if args.verb == "plan":
        print(describe_plan(sweep))
    elif args.verb == "status":
        print(describe_status(sweep))
    elif args.verb == "run":
        sweep.check_data()
        stop = StopRequest().install()
        stop_with_parent(args.stop_with_parent)
        way = Way(args.jobs, args.threads, args.retries, args.launch)
        run_sweep(sweep, way, stop, lambda text: print(text, flush=True))
    elif args.best:
        rows = best_rates(sweep, args.seed)
        print(json.dumps(rows, indent=2) if args.json else describe_best(rows))
        write_json(sweep.path / "best.json", rows)
    else:
        write_tables(sweep, with_figure=not args.no_figure)
