"""verdicts.md and report.html: nothing in them is typed by hand."""

import base64
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from periln.eval.study.figures import FIGURES, TITLES, draw
from periln.eval.study.tests import Results
from periln.eval.study.verdicts import CONTRADICTED, SUPPORTED, UNDECIDED, UNTESTABLE, PartVerdict, Verdict
from periln.runkit.folder import write_bytes, write_text
from periln.runkit.studies import Study

TEMPLATES = Path(__file__).parent


def number(value: float | None, digits: int = 3) -> str:
    """A number as the tables have it; a dash for none."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:+.{digits}g}" if abs(value) < 1e4 else f"{value:+.2e}"


def effect(part: PartVerdict) -> str:
    """`-0.031 [-0.05, -0.01] nats a token`."""
    if part.outcome is None or part.outcome.estimate.n == 0:
        lost = part.outcome.details if part.outcome else ()
        return lost[0] if lost else "no runs yet"
    e = part.outcome.estimate
    if part.outcome.unit.startswith("of "):
        return f"{e.value:.0%} {part.outcome.unit} [{e.low:.0%}, {e.high:.0%}]"
    return f"{number(e.value)} [{number(e.low)}, {number(e.high)}] {part.outcome.unit}"


def seeds_of(part: PartVerdict) -> str:
    seeds = part.outcome.seeds if part.outcome else ()
    if not seeds:
        return "-"
    whole = seeds == tuple(range(seeds[0], seeds[-1] + 1)) and len(seeds) > 2
    return f"{seeds[0]}-{seeds[-1]}" if whole else ", ".join(map(str, seeds))


def p_of(part: PartVerdict) -> str:
    if part.outcome is None or math.isnan(part.adjusted):
        return "-"
    if part.outcome.certain:
        return "a case"
    return f"{part.adjusted:.2g}" if part.adjusted >= 0.001 else "< 0.001"


def rate_table(results: Results) -> list[list[str]]:
    """A row a rate of E2: mean held-out loss of each placement over its seeds, and how many diverged of how many."""
    cells = results.of({"group": "E2"})
    rows = [["learning rate", *TITLES.values()]]
    for rate in sorted({cell["rate"] for cell in cells}):
        row = [f"{rate:g}"]
        for variant in TITLES:
            of = [cell for cell in cells if cell["rate"] == rate and cell["variant"] == variant]
            losses = [cell["heldout_loss"] for cell in of if cell["heldout_loss"] is not None]
            lost = sum(cell["status"] == "diverged" for cell in of)
            mean = f"{fmean(losses):.3f} ({len(losses)})" if losses else ""
            row.append(
                " ".join([*([mean] if mean else []), *([f"{lost} of {len(of)} diverged"] if lost else [])]) or "-"
            )
        rows.append(row)
    return rows if len(rows) > 1 else []


def markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def verdict_table(verdicts: list[Verdict]) -> list[list[str]]:
    """A row a claim, and below it one a part."""
    rows = [["claim", "verdict", "effect [95 %]", "p (Holm)", "seeds"]]
    for verdict in verdicts:
        rows.append([f"**{verdict.name}** {verdict.words}", f"**{verdict.verdict}**", "", "", ""])
        for part in verdict.parts:
            rows.append([part.words, part.verdict, effect(part), p_of(part), seeds_of(part)])
    return rows


def facts(study: Study, results: Results, best: dict[str, float | None]) -> list[str]:
    """What was run, in sentences."""
    plan, cells = study.plan, results.cells
    if not cells:
        return [f"None of the plan's {len(plan['cells'])} cells has been run."]
    lost = sum(cell["status"] == "diverged" for cell in cells)
    groups = ", ".join(
        f"{group} {sum(c['group'] == group for c in cells)} of {sum(c['group'] == group for c in plan['cells'])}"
        for group in sorted({cell["group"] for cell in plan["cells"]})
    )
    e2 = [cell for cell in cells if cell["group"] == "E2"]
    said = [
        f"{len(cells)} of {len(plan['cells'])} cells have been run ({groups}); {lost} of them diverged. "
        f"The budget is {plan['budget']}; the cells took {sum(c['seconds'] for c in cells) / 3600:.1f} hours of steps."
    ]
    if e2:
        model = e2[0]
        shape = next(cell["fields"]["model"] for cell in plan["cells"] if cell["name"] == model["cell"])
        said.append(
            f"The models of E2 have {shape['num_hidden_layers']} layers of width {shape['hidden_size']}, "
            f"{model['parameters'] / 1e6:.2f}M parameters ({model['parameters_non_embedding'] / 1e6:.2f}M without "
            f"embeddings), and read {max(c['tokens'] for c in e2):,} tokens in {model['planned_steps']} steps, in FP16 "
            "with an FP16 stream."
        )
    known = {TITLES.get(name, name): rate for name, rate in best.items() if rate is not None}
    if known:
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in known.items())
        said.append(f"Best learning rates at the first seed: {chosen}.")
    commits = sorted({str(cell["commit"])[:10] for cell in cells})
    dirty = any(cell["uncommitted_changes"] for cell in cells)
    texts = {cell["data"] for cell in cells}
    said.append(
        f"Code: commit {', '.join(commits)}{', with uncommitted changes' if dirty else ''}. "
        f"{'One text' if len(texts) == 1 else f'{len(texts)} texts, and pairs only within one'}; plan "
        f"{study.plan_hash[:10]}."
    )
    return said


def findings(results: Results, verdicts: list[Verdict]) -> list[str]:
    """What the verdicts and E2's losses say, in sentences."""
    kinds = [verdict.verdict for verdict in verdicts]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in (SUPPORTED, CONTRADICTED, UNDECIDED, UNTESTABLE))
    said = [f"Of {len(verdicts)} claims: {counts}."]
    for kind in (SUPPORTED, CONTRADICTED):
        parts = [f"{v.name}: {p.words} ({effect(p)})" for v in verdicts for p in v.parts if p.verdict == kind]
        if parts:
            said.append(f"Parts of claims that are {kind}: {'; '.join(parts)}.")
    lowest: dict[str, list[str]] = {}
    for rate in sorted({cell["rate"] for cell in results.of({"group": "E2"})}):
        cells = results.of({"group": "E2", "rate": rate})
        common = set.intersection(*({c["seed"] for c in cells if c["variant"] == name} for name in TITLES))
        means = {}
        for name in TITLES:
            losses = [c["heldout_loss"] for c in cells if c["variant"] == name and c["seed"] in common]
            if losses and None not in losses:
                means[name] = fmean(losses)
        if common and len(means) > 1:
            best = min(means, key=lambda name: means[name])
            lowest.setdefault(best, []).append(f"{rate:g}")
    for name, rates in lowest.items():
        said.append(
            f"{TITLES[name]} has the lowest mean held-out loss of the placements whose runs all completed, over the "
            f"seeds that all three have, at learning rate{'s' if len(rates) > 1 else ''} {', '.join(rates)}."
        )
    lost = {title: results.of({"group": "E2", "variant": name}) for name, title in TITLES.items()}
    parts = [
        f"{title} {sum(c['status'] == 'diverged' for c in cells)} of {len(cells)}"
        for title, cells in lost.items()
        if cells
    ]
    if parts:
        said.append(f"Diverged in E2: {', '.join(parts)}.")
    return said


def markdown(study: Study, results: Results, verdicts: list[Verdict], best: dict[str, float | None]) -> str:
    """verdicts.md."""
    parts = ["# Verdicts", "", " ".join(facts(study, results, best)), ""]
    parts += [f"- {sentence}" for sentence in findings(results, verdicts)]
    rows = rate_table(results)
    if rows:
        parts += [
            "",
            "Held-out loss in nats a token, by learning rate: mean (completed runs).",
            "",
            markdown_table(rows),
        ]
    parts += ["", "## Every claim", "", markdown_table(verdict_table(verdicts))]
    parts += ["", "## What would change each verdict", ""]
    parts += [f"- **{verdict.name}** ({verdict.verdict}): {verdict.change}" for verdict in verdicts]
    return "\n".join(parts) + "\n"


def write_report(
    study: Study,
    results: dict[str, dict[str, Any]],
    verdicts: list[Verdict],
    best: dict[str, float | None],
    out: Path,
    page: bool = True,
) -> None:
    """verdicts.md and the figures into `out`; with `page` report.html, which needs nothing else."""
    found = Results(list(results.values()), best)
    write_text(out / "verdicts.md", markdown(study, found, verdicts, best))
    images = draw(found)
    for name, data in images.items():
        write_bytes(out / "figures" / f"{name}.png", data)
    if not page:
        return
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    figures = [
        {"name": name, "src": "data:image/png;base64," + base64.b64encode(images[name]).decode(), "caption": caption}
        for name, (_, caption) in FIGURES.items()
        if name in images
    ]
    rows = [
        {"verdict": v, "parts": [(p, effect(p), p_of(p), seeds_of(p)) for p in v.parts], "shown": v.figure in images}
        for v in verdicts
    ]
    html = jinja.get_template("study.html.j2").render(
        facts=facts(study, found, best),
        findings=findings(found, verdicts),
        rows=rows,
        rates=rate_table(found),
        figures=figures,
    )
    write_text(out / "report.html", html)
