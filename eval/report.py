"""The report of a folder of runs: one HTML file that needs nothing else, and the figures beside it.

    python -m eval.report runs/demo

A pure function of the records: nothing is trained, measured, looked up or dated here, and the same records give
the same bytes.
"""

import sys

from periln.start import start

from .arguments.report import check, parse

if __name__ == "__main__":
    sys.exit(start("eval.report", parse, check))  # parses before the imports below, which take seconds

import argparse
import base64
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from runkit.folder import write_bytes, write_text
from runkit.public import public
from runkit.recipes import dump_yaml

from .bench_report import bench
from .figures.drawing import Drawing, draw_all
from .records import Frames, at_edge, by_depth, differing, load, printable, rate_text
from .render import Table, to_html, to_terminal
from .suites import CHANCE, SUITES
from .tables import MISSING, build, cell_numbers, plural, stability, status_text, suites

TEMPLATES = Path(__file__).resolve().parent / "templates"


# --- the verdict ---------------------------------------------------------------------------------------------


def _run_text(run: pd.Series) -> str:
    return f"{run.placement}, {rate_text(run.learning_rate)}, seed {run.seed}"


def _fate(runs: pd.DataFrame) -> str:
    """What became of the runs at one learning rate."""
    open_ = [
        f"{run.placement} seed {run.seed} ({status_text(run)}" + (f": {public(run.reason)})" if run.reason else ")")
        for _, run in runs[runs.status != "completed"].iterrows()
    ]
    completed = f"{(runs.status == 'completed').sum()} of {plural(len(runs), 'run')} completed"
    return f"{completed}. Not completed: {'; '.join(open_)}." if open_ else f"{completed}."


def _loss(frames: Frames, rate: float) -> list[str]:
    found = cell_numbers(frames, "mini")
    found = found[(found.learning_rate == rate) & (found.column == "loss") & (found.n > 0)]
    sized = found["size"].nunique() > 1
    parts = [
        " ".join([row.placement, *([row["size"]] if sized else []), f"{row['mean']:.3f} (n={row.n:g})"])
        for _, row in found.iterrows()
    ]
    return [f"Held-out loss in nats a token, mean of the seeds that completed: {', '.join(parts)}."] if parts else []


def _growth(frames: Frames, rate: float) -> list[str]:
    """The stream's variance after the last layer, at initialization and at the end."""
    parts, data = [], by_depth(frames.layers, "stream", "variance")
    for placement in frames.placements:
        runs = frames.cell(rate, placement)
        of = data[data.run.isin(runs.run[runs.status != "diverged"])]
        if len(of):
            deepest = of[of.x == of.x.max()]
            start, end = (at_edge(deepest, last).y.mean() for last in (False, True))
            parts.append(f"{placement} {start:.3g} to {end:.3g}")
    when = "from the first to the last recorded step, mean of the seeds that did not diverge"
    return [f"Variance of the stream after the last layer, {when}: {', '.join(parts)}."] if parts else []


def _precision(frames: Frames, numbers: pd.DataFrame) -> list[str]:
    """Headroom, spikes and skips by placement; `numbers` are those of one learning rate."""
    bits, counts = [], []
    for placement in frames.placements:
        of = numbers[numbers.placement == placement]
        measured, recorded = of[of.headroom_at.notna()], of[of.measured_steps > 0]
        if len(measured):
            row = measured.loc[measured.headroom_bits.idxmin()]
            left = f"{row.headroom_bits:.1f} bits" if math.isfinite(row.headroom_bits) else "none, overflow"
            bits.append(f"{placement} {left} ({row.headroom_at}, seed {row.seed})")
        if len(recorded):
            skipped = plural(sum(sum(skips.values()) for skips in recorded.skips), "skipped step")
            spiked = plural(sum(map(len, recorded.spikes)), "gradient spike")
            counts.append(f"{placement} {spiked} and {skipped} in {recorded.measured_steps.sum()}")
    said = [f"Least FP16 headroom at the recorded steps: {'; '.join(bits)}."] if bits else []
    return said + ([f"Spikes and skips, all seeds: {'; '.join(counts)}."] if counts else [])


def noise(frames: Frames, suite: str) -> dict[str, Any] | None:
    """What the scores of completed runs can tell apart; None where there are none.

    `gap` is the largest difference of Avg. between placements at one learning rate, `error` the standard error of
    such a difference, from the largest standard error recorded for each task: items of one task are shared by all
    runs, so that more seeds do not lower it.
    """
    completed = frames.pretrained[frames.pretrained.status == "completed"]
    scores = frames.scores[(frames.scores.metric == "acc") & frames.scores.run.isin(completed.run)]
    scores = scores[scores.task.isin(SUITES[suite]) & scores.value.notna() & (scores.stderr > 0)]
    if scores.empty:
        return None
    near = scores.value - scores.task.map(dict(zip(SUITES[suite], CHANCE, strict=True))) / 100
    averages = cell_numbers(frames, suite).query("column == 'Avg.'").dropna(subset="mean")
    blocks = [same["mean"] for _, same in averages.groupby(["size", "learning_rate"])]
    gaps = [means.max() - means.min() for means in blocks if len(means) > 1]
    errors = scores.groupby("task").stderr.max() * 100
    return {
        "sizes": sorted({int(n) for n in scores.n.dropna()}),
        "least_error": scores.stderr.min() * 100,
        "most_error": scores.stderr.max() * 100,
        "near": int((near.abs() <= 2 * scores.stderr).sum()),
        "scores": len(scores),
        "gap": max(gaps) if gaps else None,
        "error": math.sqrt(2 * (errors**2).sum()) / len(errors),
    }


def _ranking(suite: str, found: dict[str, Any] | None) -> list[str]:
    if not found or found["gap"] is None:
        return []
    within = found["gap"] <= 2 * found["error"]
    verdict = "less than" if within else "more than"
    end = "they rank no placement." if within else "whether that is the placement, so few seeds cannot tell."
    return [
        f"Scores (suite {suite}): at one learning rate the Avg. of two placements differ by at most "
        f"{found['gap']:.1f} points, {verdict} two standard errors of such a difference "
        f"({2 * found['error']:.1f} points); {end}"
    ]


def verdict(frames: Frames, numbers: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """What the records say: headings with sentences; `numbers` are those of the stability table."""
    runs = frames.pretrained
    counts = ", ".join(f"{n} {status}" for status, n in sorted(runs.status.value_counts().items()))
    said = [(f"{plural(len(runs), 'pretraining run')}: {counts}.", [])]
    for rate in frames.learning_rates:
        fate = f"Learning rate {rate:g}: {_fate(runs[runs.learning_rate == rate])}"
        here = numbers[numbers.learning_rate == rate]
        said.append((fate, _loss(frames, rate) + _growth(frames, rate) + _precision(frames, here)))
    return said + [(sentence, []) for suite in suites(frames) for sentence in _ranking(suite, noise(frames, suite))]


# --- the other sections --------------------------------------------------------------------------------------


def adds_text(adds: dict[str, dict[str, str]]) -> str:
    """`16 of 16 in float16`; adds whose terms differ are spelled out."""
    kinds = Counter()
    for add in adds.values():
        stream, branch, output = (str(add.get(key, "?")) for key in ("stream", "branch", "output"))
        kinds[output if stream == branch == output else f"{stream} + {branch} giving {output}"] += 1
    return ", ".join(f"{n} of {len(adds)} in {kind}" for kind, n in kinds.most_common()) or MISSING


def evidence(frames: Frames) -> Table:
    """What was seen of the arithmetic of each run: dtypes at the residual adds, and the loss scale."""
    rows = []
    for _, run in frames.runs.iterrows():
        seen = frames.environments[run.run]
        scale = frames.metrics[frames.metrics.run == run.run].loss_scale.dropna()
        if run.stage != "pretrain" and not seen.get("residual_adds"):
            continue
        linear = seen.get("linear_outputs") or {}
        rows.append(
            {
                "block": {"pretrain": "pretraining", "sft": "fine-tuning"}[run.stage],
                "run": _run_text(run),
                "precision": run["mode"] if isinstance(run["mode"], str) else MISSING,
                "residual adds": adds_text(seen.get("residual_adds") or {}),
                "linear outputs": ", ".join(f"{n} {dtype}" for dtype, n in linear.items()) or MISSING,
                "loss scale": " to ".join(f"{x:.15g}" for x in sorted({scale.min(), scale.max()}))
                if len(scale)
                else MISSING,
            }
        )
    rows.sort(key=lambda row: row["block"] != "pretraining")
    note = "Dtypes as seen by hooks in the first training step, not as configured. Loss scale: least to largest."
    return Table("FP16 as observed", pd.DataFrame(rows), pd.DataFrame(), (note,))


def environment(frames: Frames) -> dict[str, str]:
    """Device, threads, commit and versions; where runs differ, every value."""

    def values(read) -> str:
        found = {str(x) for x in map(read, frames.environments.values()) if x not in (None, "")}
        return public(" | ".join(sorted(found))) or MISSING

    names = ("device", "device_name", "processor", "threads", "processes", "commit", "uncommitted_changes")
    rows = {name.replace("_", " "): values(lambda e, n=name: e.get(n)) for name in names}
    packages = sorted({p for e in frames.environments.values() for p in e.get("versions") or {}})
    rows |= {package: values(lambda e, p=package: (e.get("versions") or {}).get(p)) for package in packages}
    harness = " | ".join(sorted(set(frames.scores.harness.dropna())))
    return {name: x for name, x in (rows | {"scores by": harness}).items() if x not in (MISSING, "")}


def _samples(frames: Frames) -> list[dict[str, Any]]:
    """What every model wrote, before and after fine-tuning."""

    def of(run: str) -> list[dict[str, str]]:
        return frames.samples[frames.samples.run == run].head(2).to_dict("records")

    shown = []
    for _, run in frames.pretrained.iterrows():
        tuned = frames.fine_tuned([run.run]).run
        stages = [("Before fine-tuning", of(run.run)), ("After fine-tuning", of(tuned.iloc[0]) if len(tuned) else [])]
        why = "diverged, not sampled" if run.status == "diverged" else "not measured"
        shown.append({"name": _run_text(run), "stages": stages, "why": why})
    return shown


def _recipes(frames: Frames) -> list[tuple[str, str]]:
    first = frames.pretrained.iloc[0]
    shown = [("The demo", frames.recipe)] if frames.recipe else []
    shown.append((f"One run ({_run_text(first)})", frames.recipes[first.run]))
    tuned = frames.fine_tuned(frames.pretrained.run).run
    shown += [("One fine-tuning", frames.recipes[run]) for run in tuned[:1]]
    return [(name, dump_yaml(public(recipe))) for name, recipe in shown]


def _size(frames: Frames) -> dict[str, str]:
    def values(column: str) -> str:
        found = frames.pretrained[column].dropna()
        return " to ".join(f"{int(x):,}" for x in sorted({found.min(), found.max()})) if len(found) else MISSING

    names = ("num_layers", "hidden_size", "parameters", "parameters_non_embedding", "steps")
    return {name: values(name) for name in names}


def _image(drawing: Drawing) -> dict[str, Any]:
    size = [int.from_bytes(drawing.png[at : at + 4], "big") for at in (16, 20)]  # width and height of the PNG header
    source = "data:image/png;base64," + base64.b64encode(drawing.png).decode()
    return {"src": source, "width": size[0], "height": size[1]}


def render(frames: Frames, drawings: list[Drawing]) -> str:
    """The report as one HTML page."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    jinja.filters["table"] = lambda table: Markup(to_html(table))
    steady = stability(frames)
    named = suites(frames)
    page = jinja.get_template("report.html.j2").render(
        name=frames.name,
        verdict=verdict(frames, steady.numbers),
        scores=[build(frames, suite) for suite in named],
        mini="mini" in named,
        stability=steady,
        figures=[(d, _image(d)) for d in drawings if d.png],
        missing=[d for d in drawings if not d.png],
        bench=bench(frames),
        evidence=evidence(frames),
        environment=environment(frames),
        samples=_samples(frames),
        noise=[(suite, found) for suite in named if (found := noise(frames, suite))],
        size=_size(frames),
        learning_rates=[f"{rate:g}" for rate in frames.learning_rates],
        seeds=max(len(frames.cell(r, p)) for r in frames.learning_rates for p in frames.placements),
        placements=frames.placements,
        recipes=_recipes(frames),
        differing=differing(frames),
    )
    return printable(page)


def write(frames: Frames, out: Path) -> Path:
    """Draw and write figures and report into `out`; returns the report's path."""
    drawings = draw_all(frames)
    for drawing in drawings:
        file = out / "figures" / f"figure_{drawing.name}.png"
        if drawing.png:
            write_bytes(file, drawing.png)
        else:
            file.unlink(missing_ok=True)  # of records that are no longer there
    write_text(out / "report.html", render(frames, drawings))
    return out / "report.html"


def main(args: argparse.Namespace) -> None:
    check(args)
    out = args.out or args.runs
    frames = load(args.runs)
    report = write(frames, out)
    width = shutil.get_terminal_size((144, 24)).columns
    for table in [*(build(frames, suite) for suite in suites(frames)), stability(frames)]:
        print(to_terminal(table, width), end="\n\n")
    print(report)
