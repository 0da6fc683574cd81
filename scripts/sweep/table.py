"""What a sweep found: a row a cell, means over seeds, the figure, and the best rate; all from the run folders."""

import io
import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from periln.runkit.errors import UsageError, UserError
from periln.runkit.figure_style import STYLE
from periln.runkit.folder import write_bytes, write_text
from periln.runkit.placements import colour_of, marker_of
from periln.runkit.spikes import count_spikes
from periln.runkit.steps import final_loss
from periln.scripts.sweep.cells import PLACEMENT, RATE, SEED, Cell, Sweep, label

MEASURES = ("final_loss", "spikes", "spikes_first_tenth", "skipped_steps")
TITLES = {
    "final_loss": "final training loss",
    "spikes": "gradient spikes",
    "spikes_first_tenth": "spikes, first tenth",
    "skipped_steps": "skipped steps",
}
NOTES = (
    "Final loss: mean of the finite training losses in the last tenth of the recorded steps; `±` is the sample "
    "standard deviation over the seeds. Gradient spike: a step whose gradient norm lies more than {sigmas:g} standard "
    "deviations above the mean of the {window} steps before it (runkit/spikes.py). Means are over the completed runs; "
    "runs that diverged are counted, with the steps at which they ended, and enter no mean."
)


def _row(cell: Cell) -> dict[str, Any]:
    recipe, records, state = cell.recipe, cell.run.metrics(), cell.state
    spikes, early = count_spikes((r.get("grad_norm") for r in records), recipe.steps, recipe.spikes)
    return {
        "cell": cell.name,
        "status": state,
        "placement": cell.placement,
        "learning_rate": recipe.optimizer.learning_rate,
        "warmup": recipe.optimizer.warmup,
        "seed": recipe.seed,
        **{f: label(v) for f, v in cell.values.items() if f not in (PLACEMENT, RATE, SEED, "optimizer.warmup")},
        "recorded_steps": len(records),
        "final_loss": final_loss(r["loss"] for r in records),
        "spikes": spikes,
        "spikes_first_tenth": early,
        "skipped_steps": records[-1]["skips_total"] if records else 0,
        "diverged_at": len(records) if state == "diverged" else None,
        "reason": cell.run.summary.get("reason"),
    }


def frame_of(sweep: Sweep) -> pd.DataFrame:
    """A row a cell, in the sweep's order."""
    frame = pd.DataFrame([_row(cell) for cell in sweep.cells])
    return frame.astype({"diverged_at": "Int64"})


def varied(sweep: Sweep) -> list[str]:
    """The columns that tell the table's rows apart: placement, rate, warm-up, and the grid's other fields."""
    names = {RATE: "learning_rate", "optimizer.warmup": "warmup"}
    others = [names.get(f, f) for f in sweep.grid if f not in (PLACEMENT, RATE, SEED)]
    return ["placement", *others, "learning_rate"]


def summarize(sweep: Sweep, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each setting: means over the seeds that completed, and what became of the others."""
    rows = []
    columns = varied(sweep)
    for key, runs in frame.groupby(columns, sort=False):
        done, diverged = runs[runs.status == "completed"], runs[runs.status == "diverged"]
        means = {m: done[m].mean() if len(done) else math.nan for m in MEASURES}
        rows.append(
            dict(zip(columns, key, strict=True))
            | means
            | {
                "deviation": done.final_loss.std(ddof=1) if len(done) > 1 else math.nan,
                "completed": len(done),
                "diverged": len(diverged),
                "diverged_at": sorted(int(x) for x in diverged.diverged_at),
                "runs": len(runs),
            }
        )
    return pd.DataFrame(rows)


def markdown(sweep: Sweep, frame: pd.DataFrame, summary: pd.DataFrame) -> str:
    """The table as Markdown, with what its columns mean."""
    heads = [*varied(sweep), "runs", *(TITLES[m] for m in MEASURES), "diverged (at step)"]
    lines = [f"# {sweep.name}", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in summary.to_dict("records"):
        loss = "" if math.isnan(row["final_loss"]) else f"{row['final_loss']:.4f}"
        loss += "" if math.isnan(row["deviation"]) else f" ± {row['deviation']:.4f}"
        counts = ["" if math.isnan(row[m]) else f"{row[m]:.4g}" for m in MEASURES[1:]]
        steps = f" ({', '.join(map(str, row['diverged_at']))})" if row["diverged"] else ""
        values = [label(row[c]) for c in varied(sweep)]
        cells = [*values, f"{row['completed'] + row['diverged']} of {row['runs']}", loss, *counts]
        lines.append(f"| {' | '.join(cells)} | {row['diverged']}{steps} |")
    open_ = frame[~frame.status.isin(["completed", "diverged"])]
    rules = sweep.cells[0].recipe.spikes
    lines += ["", NOTES.format(sigmas=rules.sigmas, window=rules.window)]
    if len(open_):
        lines += ["", f"Not finished: {', '.join(f'{r.cell} ({r.status})' for r in open_.itertuples())}."]
    return "\n".join(lines) + "\n"


def _axis_of(sweep: Sweep) -> str:
    return "learning_rate" if RATE in sweep.grid or "optimizer.warmup" not in sweep.grid else "warmup"


def figure(sweep: Sweep, frame: pd.DataFrame) -> bytes:
    """The PNG: a column for each measure against the learning rate, a row for each combination of the other fields.

    Dots are runs, lines means over the completed seeds; a cross on the upper edge is a run that diverged.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise UserError("the figure needs matplotlib: pip install matplotlib, or give --no-figure") from error

    x = _axis_of(sweep)
    others = [c for c in varied(sweep) if c not in ("placement", x)]
    panels = list(frame.groupby(others, sort=False)) if others else [((), frame)]
    with mpl.rc_context(mpl.rcParamsDefault | STYLE):
        size = (2.9 * len(MEASURES), 2.5 * len(panels) + 0.6)
        drawn = Figure(figsize=size, dpi=120, layout="constrained")
        axes = drawn.subplots(len(panels), len(MEASURES), squeeze=False, sharex=True)
        for row, (key, runs) in zip(axes, panels, strict=True):
            where = ", ".join(f"{n} {label(v)}" for n, v in zip(others, key, strict=True)) if len(panels) > 1 else ""
            for ax, measure in zip(row, MEASURES, strict=True):
                _draw(ax, runs, x, measure)
                ax.set_title(TITLES[measure] + (f"\n{where}" if where else ""))
                ax.set_xlabel(x.replace("_", " ") if ax in axes[-1] else "")
        handles = [
            Line2D([], [], color=colour_of(p), marker=marker_of(p), label=p) for p in dict.fromkeys(frame.placement)
        ]
        if (frame.status == "diverged").any():
            handles.append(Line2D([], [], color="#444444", marker="x", markersize=7, linestyle="", label="diverged"))
        drawn.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        data = io.BytesIO()
        drawn.savefig(data, format="png", metadata={"Software": None})
    return data.getvalue()


def _draw(ax: Any, runs: pd.DataFrame, x: str, measure: str) -> None:
    for i, (placement, of) in enumerate(runs.groupby("placement", sort=False)):
        colour, marker = colour_of(placement), marker_of(placement)
        done, diverged = of[of.status == "completed"], of[of.status == "diverged"]
        means = done.groupby(x)[measure].mean()
        ax.plot(means.index, means.to_numpy(), color=colour, marker=marker, linewidth=1.8)
        ax.plot(done[x], done[measure], ".", color=colour, alpha=0.45)
        if measure == "final_loss":
            height = [1.0 - 0.05 * i] * len(diverged)
            mark = {"color": colour, "markersize": 8, "markeredgewidth": 2, "clip_on": False, "in_layout": False}
            ax.plot(diverged[x], height, "x", transform=ax.get_xaxis_transform(), **mark)
    if x == "learning_rate":
        ax.set_xscale("log")
    if measure != "final_loss":
        ax.set_ylim(bottom=0)


def write_tables(sweep: Sweep, with_figure: bool = True, tell: Callable[[str], None] = print) -> pd.DataFrame:
    """Write table.csv, table.md and table.png into the sweep's folder; returns the rows."""
    frame = frame_of(sweep)
    write_text(sweep.path / "table.csv", frame.to_csv(index=False))
    text = markdown(sweep, frame, summarize(sweep, frame))
    write_text(sweep.path / "table.md", text)
    tell(text)
    if with_figure:
        write_bytes(sweep.path / "table.png", figure(sweep, frame))
    return frame


# --- the best rate -------------------------------------------------------------------------------------------


def best_rates(sweep: Sweep, seed: int | None = None) -> list[dict[str, Any]]:
    """For each setting but rate and seed, the learning rate of lowest final training loss at one seed.

    The paper's rule for Post-LN (appendix C.1). The seed is the smallest of the grid unless given.

    Raises:
        UsageError: no cell has this seed.
    """
    frame = frame_of(sweep)
    seed = min(frame.seed) if seed is None else seed
    if seed not in set(frame.seed):
        raise UsageError(f"--seed {seed} is none of the sweep's: {', '.join(map(str, sorted(set(frame.seed))))}")
    rows, others = [], [c for c in varied(sweep) if c != "learning_rate"]
    for key, runs in frame[frame.seed == seed].groupby(others, sort=False):
        done = runs[(runs.status == "completed") & runs.final_loss.notna()]
        best = done.loc[done.final_loss.idxmin()] if len(done) else None
        rate = None if best is None else float(best.learning_rate)
        edge = rate is not None and len(runs) > 1 and rate in (min(runs.learning_rate), max(runs.learning_rate))
        rows.append(
            dict(zip(others, key, strict=True))
            | {
                "learning_rate": rate,
                "final_loss": None if best is None else float(best.final_loss),
                "seed": int(seed),
                "rates": len(runs),
                "diverged": int((runs.status == "diverged").sum()),
                "not_finished": int((~runs.status.isin(["completed", "diverged"])).sum()),
                "at_edge": bool(edge),
            }
        )
    return rows


def describe_best(rows: list[dict[str, Any]]) -> str:
    """The best rates in words, with what speaks against relying on them."""
    lines = []
    for row in rows:
        known = ("learning_rate", "final_loss", "seed", "rates", "diverged", "not_finished", "at_edge")
        name = ", ".join(str(v) if k == "placement" else f"{k} {v}" for k, v in row.items() if k not in known)
        if row["learning_rate"] is None:
            found = "no rate has completed"
        else:
            found = f"learning rate {row['learning_rate']:g}, final loss {row['final_loss']:.4f}"
        notes = [f"seed {row['seed']}", f"{row['rates']} rates"]
        notes += [f"{row['diverged']} diverged"] if row["diverged"] else []
        notes += [f"{row['not_finished']} not finished"] if row["not_finished"] else []
        notes += ["at the edge of the grid: widen it"] if row["at_edge"] else []
        lines.append(f"{name}: {found} ({'; '.join(notes)})")
    return "\n".join(lines)
