"""The report on each run besides its scores: what happened in it, the bench's verdict, and the certificate."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from periln.eval.figures.layer_rows import bench_report, data_words
from periln.eval.figures.selection import view_of
from periln.eval.records.explain import explain
from periln.eval.records.frames import Frames
from periln.eval.records.words import rate_text
from periln.runkit.folder import read_json
from periln.runkit.number_format import FP16
from periln.runkit.text import printable


def _sentences(report: dict[str, Any]) -> list[str]:
    """The verdict's sentences, whether given as a list or one by one."""
    found = report.get("verdict") or report.get("verdicts") or []
    found = [found] if isinstance(found, str) else list(found.values()) if isinstance(found, dict) else found
    return [printable(text) for text in found if isinstance(text, str)]


def _explained(folder: Path, run: pd.Series) -> list[str]:
    """`explain` of a run that diverged, or has recorded events other than the first attempts at a loss scale."""
    events = folder / "flight" / "events.jsonl"
    happened = run.status == "diverged"
    for line in events.read_text().splitlines() if events.exists() else ():
        try:
            happened |= json.loads(line).get("skip_kind") != "probe"
        except (ValueError, AttributeError):
            break
    # The first line repeats the heading.
    return [printable(line) for line in explain(folder).splitlines()[1:]] if happened else []


def certificate_words(certificate: dict[str, Any], of: str = "") -> list[str]:
    """A certificate in two sentences: the largest bound, and what has no bound."""
    rows = [row for row in certificate.get("rows") or [] if isinstance(row, dict)]
    if not rows:
        return []
    limit = certificate.get("limit") or FP16.largest
    bounded = [row for row in rows if isinstance(row.get("bound"), (int, float))]
    above = [row for row in bounded if row["bound"] > limit]
    said = (
        f"FP16 certificate from the weights alone{of}: {len(bounded)} of {len(rows)} tensors have a bound for any input"
    )
    if bounded:
        top = max(bounded, key=lambda row: row["bound"])
        said += f", the largest {top['bound']:,.4g} ({_place(top)}); {len(above)} of the bounds are above {limit:,.0f}"
    sentences = [f"{said}."]
    free = [row for row in rows if not isinstance(row.get("bound"), (int, float))]
    if free:
        reasons = list(dict.fromkeys(str(row["why"]) for row in free if row.get("why")))
        why = f" Why: {'; '.join(reasons[:3])}." if reasons else ""
        kinds = ", ".join(sorted({str(row.get("tensor")) for row in free}))
        sentences.append(f"Not bounded: {len(free)} tensors ({kinds}).{why}")
    return [printable(text) for text in sentences]


def _place(row: dict[str, Any]) -> str:
    return f"layer {row.get('layer')}, {row.get('sublayer')}, {row.get('tensor')}"


def _certificate(folder: Path) -> list[str]:
    files = sorted((folder / "eval" / "stability").glob("certificate_*.json"))
    if not files:
        return []
    step = files[-1].stem.removeprefix("certificate_").lstrip("0") or "0"
    found = read_json(files[-1])
    return certificate_words(found, f" (step {step})") if isinstance(found, dict) else []


def _formats(folder: Path) -> dict[str, Any] | None:
    """What the number formats' table says about the newest checkpoint that has one: a heading, and sentences."""
    files = sorted((folder / "eval" / "formats").glob("step_*/formats.json"))
    found = read_json(files[-1]) if files else None
    if not isinstance(found, dict) or not found.get("said"):
        return None
    asked = found.get("asked") or {}
    on = f"{asked.get('samples')} samples of {asked.get('tokens')} tokens, step {asked.get('step')}"
    return {
        "heading": printable(f"Number formats, by emulation in FP32 ({on}):"),
        "said": [printable(text) for text in found["said"] if isinstance(text, str)],
    }


def bench(frames: Frames) -> list[dict[str, Any]]:
    """A mapping for each run with something to report: name, explained, verdict, measured, certificate,
    formats (None, or a heading and sentences)."""
    said = []
    for _, run in view_of(frames).runs.iterrows():
        folder = frames.folders.get(run.run)
        if folder is None:
            continue
        report = bench_report(frames, run.run)
        entry = {
            "name": f"{run.series}, {rate_text(run.learning_rate)}, seed {run.seed}",
            "explained": _explained(folder, run),
            "verdict": _sentences(report),
            "measured": f"The stability bench, on {data_words(report)}:",
            "certificate": _certificate(folder),
            "formats": _formats(folder),
        }
        if entry["explained"] or entry["verdict"] or entry["certificate"] or entry["formats"]:
            said.append(entry)
    return said
