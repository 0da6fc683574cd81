"""The tables of the report: scores in the shape of the Peri-LN paper's Table 2, and the stability of every run.

A table holds the strings that are shown and the numbers they were made from; it is rendered as text for a
terminal, as Markdown and as HTML.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .records import Frames, differing, final_loss, headroom, largest, spikes

TASKS = {
    "mini": ("mini_arc_easy", "mini_hellaswag", "mini_piqa", "mini_social_iqa", "mini_winogrande"),
    "hub": ("arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande"),
}
CHANCE = (25.0, 25.0, 50.0, 100 / 3, 50.0)  # percent, in the order of TASKS
MISSING = "n/a"
DIVERGED = "Diverged"
SCORES_NOTE = (
    "Tasks: accuracy (acc) in percent, mean ± sample standard deviation (n-1) over the seeds that completed; n=1: "
    "one such seed, no deviation. Avg. is the plain mean of the five task means. Held-out loss in nats a token."
)
SPIKES_NOTE = (
    "Final loss: mean of the finite training losses in the last tenth of the recorded steps. Gradient spike: a step "
    "whose gradient norm, before clipping, exceeds the mean of the 128 steps before it (all there are, at least 16) "
    "by 6 of their standard deviations."
)
SKIPS_NOTE = (
    "Skipped steps, by kind: forward: the loss itself was not finite; probe: the gradient overflowed at a loss "
    "scale not yet proven; backward: it overflowed at a scale that had worked before."
)
HEADROOM_NOTE = (
    "Headroom: log2(65504 / max |x|) over stream, residual sums and module outputs at the steps at which layer "
    "statistics were recorded; other steps were not looked at."
)
STREAM, MODULES = ("stream",), ("residual_add", "branch")


@dataclass(frozen=True)
class Table:
    """`text` is what is shown, a block for each value of its first column; `numbers` is what it was made from."""

    title: str
    text: pd.DataFrame
    numbers: pd.DataFrame
    notes: tuple[str, ...] = ()
    keys: int = 1  # columns of a block that name its rows

    @property
    def blocks(self) -> list[tuple[str, pd.DataFrame]]:
        """Heading and rows of every block, in order."""
        first = self.text.columns[0]
        return [(str(key), rows.drop(columns=first)) for key, rows in self.text.groupby(first, sort=False)]


def plural(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


# --- Table 2 -------------------------------------------------------------------------------------------------


def suites(frames: Frames) -> list[str]:
    """The task suites that were evaluated; the one the demo's recipe names where none was yet."""
    tasks = set(frames.scores.task)
    asked = (frames.recipe.get("evaluation") or {}).get("suite")
    return [s for s in TASKS if tasks & set(TASKS[s])] or [asked if asked in TASKS else "mini"]


def _statistics(values: pd.Series) -> dict[str, float]:
    values = values.dropna()
    return {"mean": values.mean(), "std": values.std(ddof=1), "n": len(values)}


def _numbers(frames: Frames, tasks: Sequence[str], runs: Sequence[str]) -> list[dict]:
    """Mean, sample standard deviation and n of every column over some runs, in the units shown."""
    scores = frames.scores
    wanted = [(task, "acc", 100.0) for task in tasks] + [("heldout", "loss", 1.0), ("heldout", "bits_per_byte", 1.0)]
    rows = []
    for task, metric, unit in wanted:
        of = scores[(scores.task == task) & (scores.metric == metric) & scores.run.isin(list(runs))]
        rows.append({"column": task if metric == "acc" else metric} | _statistics(of.value * unit))
    return rows


def _average(numbers: list[dict]) -> dict[str, float]:
    """Avg.: the plain mean of the task means, if every task has one; no deviation is given for it."""
    means = [row["mean"] for row in numbers if row["column"] not in ("loss", "bits_per_byte")]
    return {"mean": sum(means) / len(means), "std": math.nan, "n": min(row["n"] for row in numbers[: len(means)])}


def cell_numbers(frames: Frames, tasks: Sequence[str], learning_rate: float, placement: str) -> pd.DataFrame:
    """The numbers of one row of the table: column, mean, std, n, over the seeds that completed."""
    completed = frames.cell(learning_rate, placement).query("status == 'completed'").run
    tuned = frames.fine_tuned(completed).query("status == 'completed'").run
    rows = _numbers(frames, tasks, completed)
    after = _average(_numbers(frames, tasks, tuned))
    rows += [{"column": "Avg."} | _average(rows), {"column": "SFT Avg."} | after]
    return pd.DataFrame(rows).assign(learning_rate=learning_rate, placement=placement)


def _shown(row: pd.Series, digits: int) -> str:
    if row.n == 0 or math.isnan(row["mean"]):
        return MISSING
    if row.n == 1:
        return f"{row['mean']:.{digits}f} (n=1)"
    return f"{row['mean']:.{digits}f}" + ("" if math.isnan(row["std"]) else f" ± {row['std']:.{digits}f}")


def survival(runs: pd.DataFrame) -> str:
    """`2/2`: completed of all; what neither completed nor diverged is named."""
    open_ = runs.status[~runs.status.isin(["completed", "diverged"])].value_counts()
    rest = ", ".join(f"{n} {status}" for status, n in sorted(open_.items()))
    return f"{(runs.status == 'completed').sum()}/{len(runs)}" + (f" ({rest})" if rest else "")


def _limit(frames: Frames, tasks: Sequence[str], runs: Sequence[str]) -> str:
    scores = frames.scores[frames.scores.task.isin(tasks) & frames.scores.run.isin(list(runs))]
    if scores.empty:
        return ""
    limits = sorted(scores.limit.dropna().unique())
    return ", ".join([f"limit {x:g}" for x in limits] + ["none"] * bool(scores.limit.isna().any()))


def _row(frames: Frames, tasks: Sequence[str], numbers: pd.DataFrame, runs: pd.DataFrame) -> dict[str, str]:
    gone = len(runs) > 0 and (runs.status == "diverged").all()
    tuned = frames.fine_tuned(runs.run)
    tuned_gone = gone or (len(tuned) > 0 and (tuned.status == "diverged").all())
    by = numbers.set_index("column")
    shown = {c: DIVERGED if gone else _shown(by.loc[c], 1) for c in (*tasks, "Avg.")}
    shown["held-out loss"] = DIVERGED if gone else _shown(by.loc["loss"], 3)
    shown["bits per byte"] = DIVERGED if gone else _shown(by.loc["bits_per_byte"], 3)
    shown["SFT Avg."] = DIVERGED if tuned_gone else _shown(by.loc["SFT Avg."], 1)
    shown["seeds survived"] = survival(runs)
    shown["limit"] = _limit(frames, tasks, [*runs.run, *tuned.run])
    return shown


def build(frames: Frames, suite: str) -> Table:
    """The scores of one suite: a block a learning rate, a row a placement.

    `numbers` has learning_rate, placement, column, mean, std (sample, n-1) and n, accuracies in percent.
    """
    tasks, rows, numbers = TASKS[suite], [], []
    for rate in frames.learning_rates:
        for placement in frames.placements:
            runs = frames.cell(rate, placement)
            if runs.empty:
                continue
            numbers.append(cell_numbers(frames, tasks, rate, placement))
            head = {"block": f"learning rate {rate:g}", "placement": placement}
            rows.append(head | _row(frames, tasks, numbers[-1], runs))
    chance = {task: f"{x:.1f}" for task, x in zip(tasks, CHANCE, strict=True)}
    text = pd.DataFrame(rows)
    if not text["limit"].str.contains("limit").any():
        text = text.drop(columns="limit")
    rows_at_chance = {"block": "for comparison", "placement": "chance", "Avg.": f"{np.mean(CHANCE):.1f}", **chance}
    text = pd.concat([text, pd.DataFrame([rows_at_chance])], ignore_index=True).fillna("")
    return Table(f"Scores, suite {suite}", text, pd.concat(numbers, ignore_index=True), _notes(frames))


def _notes(frames: Frames) -> tuple[str, ...]:
    notes = [SCORES_NOTE]
    if other := differing(frames):
        notes.append(f"These runs differ in more than placement, learning rate and seed: {', '.join(other)}.")
    return tuple(notes)


# --- stability -----------------------------------------------------------------------------------------------


def _place(row: pd.Series) -> str:
    where = "embedding" if row.layer == 0 else f"layer {int(row.layer)} {row.sublayer}"
    return f"{row.tensor}, {where}, step {int(row.step)}"


def status_text(run: pd.Series) -> str:
    """`completed`, or what else and at which step."""
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
        "spikes": spikes(metrics),
        "skips": _skips(metrics),
        "max_abs_stream": math.nan if stream is None else float(stream.value),
        "stream_recorded": stream is not None,
        "headroom_bits": math.nan if overall is None else headroom(float(overall.value)),
        "headroom_at": None if overall is None else _place(overall),
    }


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
    return Table("Stability", text, pd.DataFrame(numbers), (SPIKES_NOTE, SKIPS_NOTE, HEADROOM_NOTE), keys=2)


# --- rendering -----------------------------------------------------------------------------------------------


def _head_lines(head: str, width: int) -> list[str]:
    """A column's head on as many lines as its width asks for; task names break after an underscore."""
    lines = textwrap.wrap(head.replace("_", "_ "), width, break_long_words=False)
    return [line.replace("_ ", "_") for line in lines]


def _spread(columns: Sequence[list[str]], width: int, keys: int) -> list[list[int]]:
    """Column numbers in as many pieces as the width asks for; every piece starts with the columns of the row names."""
    names = list(range(keys))
    start = sum(2 + len(columns[i][0]) for i in names) - 2
    pieces, used = [names.copy()], start
    for i in range(keys, len(columns)):
        wide = 2 + len(columns[i][0])
        if used + wide > width and len(pieces[-1]) > keys:
            pieces.append(names.copy())
            used = start
        pieces[-1].append(i)
        used += wide
    return pieces


def to_terminal(table: Table, width: int = 120) -> str:
    """Plain text; what is wider than `width` goes on below, with its row names again."""
    heads = list(table.text.columns[1:])
    body = [rows.to_numpy().tolist() for _, rows in table.blocks]
    columns, tall = [], 1
    for i, head in enumerate(heads):
        cells = [str(row[i]) for rows in body for row in rows]
        lines = _head_lines(head, max(8, *map(len, cells)))
        columns.append((lines, cells, max(map(len, lines + cells))))
        tall = max(tall, len(lines))
    padded = []
    for i, (lines, cells, wide) in enumerate(columns):
        fit = str.ljust if i == 0 else str.rjust
        padded.append([fit(x, wide) for x in [""] * (tall - len(lines)) + lines + cells])
    out = [table.title]
    for piece in _spread(padded, width, table.keys):
        lines = ["  ".join(padded[i][k] for i in piece).rstrip() for k in range(len(padded[0]))]
        out += ["", *filter(None, lines[:tall])]
        at = tall
        for name, rows in table.blocks:
            out += [f"-- {name}", *lines[at : at + len(rows)]]
            at += len(rows)
    return "\n".join([*out, "", *(line for note in table.notes for line in textwrap.wrap(note, width))])


def to_markdown(table: Table) -> str:
    """A Markdown table; the heading of a block is a row of its own."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    heads = list(table.text.columns[1:])
    out = [line(heads), line(["---"] + ["---:"] * (len(heads) - 1))]
    for name, rows in table.blocks:
        out.append(line([f"**{name}**"] + [""] * (len(heads) - 1)))
        out += [line(row) for row in rows.to_numpy().tolist()]
    return "\n".join([*out, "", *table.notes]) + "\n"


def to_html(table: Table) -> str:
    """A `<table>` with a caption and a row group a block; every text is escaped."""

    def cell(i: int, text: str) -> str:
        return f'<th scope="row">{html.escape(text)}</th>' if i < table.keys else f"<td>{html.escape(text)}</td>"

    heads = list(table.text.columns[1:])
    out = [f"<table><caption>{html.escape(table.title)}</caption>", "<thead><tr>"]
    out += [f'<th scope="col">{html.escape(head).replace("_", "_<wbr>")}</th>' for head in heads]
    out.append("</tr></thead>")
    for name, rows in table.blocks:
        out.append(
            f'<tbody><tr><th class="block" scope="rowgroup" colspan="{len(heads)}">{html.escape(name)}</th></tr>'
        )
        out += [
            "<tr>" + "".join(cell(i, str(x)) for i, x in enumerate(row)) + "</tr>" for row in rows.to_numpy().tolist()
        ]
        out.append("</tbody>")
    return "\n".join([*out, "</table>"])
