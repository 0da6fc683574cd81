"""An index of local checkpoints: `python -m model_cards.zoo DIR...` writes zoo.html (one file) and zoo.md.

A row is a run with its newest checkpoint (a fine-tuning: its chosen one), or a model folder outside of any run, such as
an export. A pure function of the folders: the same records give the same bytes.
"""

import sys

from periln.model_cards.arguments.zoo import check, parse
from periln.start import start

if __name__ == "__main__":
    sys.exit(start("model_cards.zoo", parse, check))  # parses before the imports below, which take seconds

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from periln.model_cards.cards import TEMPLATES
from periln.model_cards.facts import (
    MISSING,
    bench_headroom,
    best_results,
    final_loss,
    loss_in_words,
    markdown,
    mean_accuracy,
    number,
    text,
    tokens_seen,
    training_headroom,
)
from periln.model_cards.subject import IN_A_RUN, Subject, listed_checkpoint
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder, write_text
from periln.runkit.number_format import FP16
from periln.runkit.pages import asset, policy
from periln.runkit.placements import placement_name
from periln.runkit.process import start_stage
from periln.runkit.progress import progress_bar

HEAD = (
    "model",
    "placement",
    "parameters (with embeddings)",
    "tokens",
    "status",
    "loss",
    "scores",
    "FP16 headroom",
    "checkpoint",
)
SKIPPED = ("trainer_state", "eval", "layers", "figures", "selection", "flight")  # folders that hold no models


def found_under(root: Path) -> Iterator[Subject]:
    """Runs and model folders under a folder, itself included, in the order of their paths.

    A run's own model folders are not listed with it, except the merged one.
    """
    for here, folders, files in os.walk(root):
        path = Path(here)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in SKIPPED)
        if "recipe.yaml" in files:
            run = RunFolder(path)
            if run.recipe.get("stage") in ("pretrain", "sft"):
                folders[:] = [f for f in folders if f != "checkpoints"]
                # Its weights are not read, so that a large zoo is indexed quickly.
                yield Subject(listed_checkpoint(run), run)
        elif "config.json" in files and any(f.endswith(".safetensors") for f in files):
            folders.clear()
            owner = path.resolve().parent
            inside = owner.name in IN_A_RUN and (owner.parent / "recipe.yaml").exists()
            yield Subject(path, RunFolder(owner.parent) if inside else None)


def loss_of(subject: Subject) -> str:
    """Held-out loss, else C4's, else the training loss, and which it is."""
    losses = {task: r["value"] for (task, metric), r in best_results(subject).items() if metric == "loss"}
    for task, name in (("heldout", "held-out"), ("c4", "C4")):
        if task in losses:
            return f"{losses[task]:.4f} ({name})"
    loss = final_loss(subject)
    return MISSING if loss is None else f"{loss_in_words(loss)} (training)"


def scores_of(subject: Subject) -> str:
    """The mean of acc over the five benchmarks, or over the mini sets, and each of them."""
    if found := mean_accuracy(subject):
        mean, name, each = found
        return f"{mean:.2f} % ({name}: {', '.join(f'{task} {value:.1f}' for task, value in each.items())})"
    scores = {task: r["value"] for (task, metric), r in best_results(subject).items() if metric == "acc"}
    return ", ".join(f"{task} {100 * value:.1f} %" for task, value in scores.items()) or MISSING


def row_of(subject: Subject, root: Path) -> dict[str, str]:
    """What the index says about one model."""
    config, headroom = subject.config, bench_headroom(subject) or training_headroom(subject)
    ours = config.get("model_type") == "peri_llama"
    where = subject.run.path if subject.run is not None and subject.checkpoint is None else subject.checkpoint
    name = subject.run.path if subject.run is not None and subject.checkpoint is not None else where
    if subject.checkpoint is not None and subject.checkpoint.resolve().parent.name == "merged":
        name = subject.checkpoint
    return {
        "model": _below(name, root),
        "placement": placement_name(config, "not recorded") if ours else _architecture(config),
        "parameters (with embeddings)": number(subject.parameters),
        "tokens": number(tokens_seen(subject)),
        "status": text(subject.summary.get("status")) if subject.run is not None else "no run next to it",
        "loss": loss_of(subject),
        "scores": scores_of(subject),
        "FP16 headroom": str(headroom) if headroom else MISSING,
        "checkpoint": _below(where, root) if subject.checkpoint is not None else "none",
    }


def _architecture(config: dict[str, Any]) -> str:
    return f"{config['model_type']} (export)" if config.get("model_type") else "not recorded"


def _below(path: Path, root: Path) -> str:
    """A path below the folder that was given, with that folder's own name in front: never an absolute one."""
    inside = path.resolve().relative_to(root.resolve()).as_posix()
    return root.resolve().name if inside == "." else f"{root.resolve().name}/{inside}"


def collect(roots: Sequence[Path], args: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of all folders; one that is found twice is listed once.

    Raises:
        UserError: a folder is missing, holds no model, or a record is damaged.
    """
    seen, subjects = set(), []
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"{root} is {'not a folder' if root.exists() else 'missing'}: give a folder of models")
        before = len(subjects)
        for subject in found_under(root):
            key = (subject.checkpoint or subject.run.path).resolve()
            if key not in seen:
                seen.add(key)
                subjects.append((subject, root))
        if len(subjects) == before and not seen:
            raise UsageError(f"{root} holds no runs and no models")
    with progress_bar(args, len(subjects), "zoo", "model") as bar:
        rows = []
        for subject, root in subjects:
            rows.append(row_of(subject, root))
            bar.update()
    return rows


def render_markdown(rows: Sequence[dict[str, str]]) -> str:
    table = markdown([tuple(row[name].replace("|", "\\|") for name in HEAD) for row in rows], HEAD)
    return f"# Model zoo\n\n{len(rows)} models.\n\n{table}\n"


def render_html(rows: Sequence[dict[str, str]]) -> str:
    """The index as one self-contained page."""
    jinja: Any = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    script = asset("tables.js")
    return jinja.get_template("zoo.html.j2").render(
        fp16_limit=FP16.limit,
        head=HEAD,
        rows=[[row[name] for name in HEAD] for row in rows],
        style=Markup(asset("page.css")),
        script=Markup(script),
        policy=policy(script),
    )


def main(args: argparse.Namespace) -> None:
    start_stage(args)
    check(args)
    rows = collect(args.folders, args)
    write_text(args.out / "zoo.html", render_html(rows))
    write_text(args.out / "zoo.md", render_markdown(rows))
    print(f"{len(rows)} models: {args.out / 'zoo.html'}, {args.out / 'zoo.md'}")
