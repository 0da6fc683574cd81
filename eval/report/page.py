"""The report as one HTML page that needs no other file."""

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from periln.eval.figures.files import FigureFiles, all_figures
from periln.eval.figures.plots import packed
from periln.eval.records.derived import differing
from periln.eval.records.frames import Frames
from periln.eval.report.answer import answer
from periln.eval.report.stability_section import bench
from periln.eval.report.verdict import noise, run_text, verdict
from periln.eval.tables.report_tables import MISSING, build, suites
from periln.eval.tables.run_stability import stability
from periln.eval.text_table import Table, to_html
from periln.runkit.folder import write_bytes, write_text
from periln.runkit.pages import asset, policy
from periln.runkit.public import public
from periln.runkit.recipes import dump_yaml
from periln.runkit.text import printable

FIRST = "overview"  # the figure next to the answer
TEMPLATES = Path(__file__).resolve().parent


def adds_text(adds: dict[str, dict[str, str]]) -> str:
    """`16 of 16 in float16`; adds whose terms differ are spelled out."""
    kinds: Counter[str] = Counter()
    for add in adds.values():
        stream, branch, output = (str(add.get(key, "?")) for key in ("stream", "branch", "output"))
        kinds[output if stream == branch == output else f"{stream} + {branch} giving {output}"] += 1
    return ", ".join(f"{n} of {len(adds)} in {kind}" for kind, n in kinds.most_common()) or MISSING


def evidence(frames: Frames) -> Table:
    """Evidence of each run's arithmetic: dtypes at the residual adds, and the loss scale."""
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
                "run": run_text(run),
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
        shown.append({"name": run_text(run), "stages": stages, "why": why})
    return shown


def _recipes(frames: Frames) -> list[tuple[str, str]]:
    first = frames.pretrained.iloc[0]
    shown = [("The demo", frames.recipe)] if frames.recipe else []
    shown.append((f"One run ({run_text(first)})", frames.recipes[first.run]))
    tuned = frames.fine_tuned(frames.pretrained.run).run
    shown += [("One fine-tuning", frames.recipes[run]) for run in tuned[:1]]
    return [(name, dump_yaml(public(recipe))) for name, recipe in shown]


def _size(frames: Frames) -> dict[str, str]:
    def values(column: str) -> str:
        found = frames.pretrained[column].dropna()
        return " to ".join(f"{int(x):,}" for x in sorted({found.min(), found.max()})) if len(found) else MISSING

    names = ("num_layers", "hidden_size", "parameters", "parameters_non_embedding", "steps")
    return {name: values(name) for name in names}


def _image(figure: FigureFiles) -> dict[str, Any]:
    assert figure.png is not None
    size = [int.from_bytes(figure.png[at : at + 4], "big") for at in (16, 20)]  # width and height of the PNG header
    source = "data:image/png;base64," + base64.b64encode(figure.png).decode()
    return {"src": source, "width": size[0], "height": size[1]}


def render(frames: Frames, figures: list[FigureFiles]) -> str:
    """The report as one HTML page."""
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    jinja.filters["table"] = lambda table: Markup(to_html(table))
    script = "\n".join(map(asset, ("tables.js", "charts.js", "maps.js")))
    steady = stability(frames)
    named = suites(frames)
    page = jinja.get_template("report.html.j2").render(
        name=frames.name,
        style=Markup(asset("page.css")),
        script=Markup(script),
        policy=policy(script),
        plots=Markup(packed({d.name: d.plot for d in figures if d.plot and d.png})),
        answer=answer(frames),
        verdict=verdict(frames, steady.numbers),
        scores=[build(frames, suite) for suite in named],
        mini="mini" in named,
        stability=steady,
        first=next(((d, _image(d)) for d in figures if d.png and d.name == FIRST), None),
        figures=[(d, _image(d)) for d in figures if d.png and d.name != FIRST],
        missing=[d for d in figures if not d.png],
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
    figures = list(all_figures(frames))
    for figure in figures:
        file = out / "figures" / f"figure_{figure.name}.png"
        if figure.png:
            write_bytes(file, figure.png)
        else:
            file.unlink(missing_ok=True)  # of records that no longer exist
    write_text(out / "report.html", render(frames, figures))
    return out / "report.html"
