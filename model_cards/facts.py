"""What the records say, as text for cards: every number from the run folder, "not measured" where there is none."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pandas as pd

from periln.model_cards.subject import Subject, listed_checkpoint
from periln.runkit import steps
from periln.runkit.control_tokens import END_OF_TURN
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json
from periln.runkit.number_format import FP16
from periln.runkit.public import public
from periln.runkit.recipes import differing_fields
from periln.runkit.scores import protocol, that_count
from periln.runkit.spikes import rules_of, spike_steps
from periln.runkit.tasks import COUNT, SUITES, TASKS

MISSING = "not measured"
FP16_TENSORS = ("stream", "residual_add", "branch")  # what has the residual stream's dtype
Row = tuple[str, str]


def number(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant digits and separated thousands; MISSING for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def text(value: Any) -> str:
    """Words of a record as one line of a table; MISSING for none."""
    if value in (None, "", [], {}):
        return MISSING
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(str(public(value)).split()).replace("|", "\\|")


def entry(record: dict[str, Any], name: str) -> str:
    """A field as text: `none` where the record says so, MISSING where it says nothing."""
    return "none" if name in record and record[name] is None else text(record.get(name))


def markdown(rows: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- training ------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Seconds as `45 s`, `12.3 min`, `5.2 h`."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _column(subject: Subject, key: str) -> list[float]:
    return [r[key] for r in subject.metrics if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])]


def hardware(subject: Subject) -> list[Row]:
    """Device, processes, time and speed; the time is the sum of the recorded steps."""
    e, seconds, speed = subject.environment, _column(subject, "step_seconds"), _column(subject, "tokens_per_second")
    mfu, commit = _column(subject, "mfu"), text(e.get("commit"))
    versions = ", ".join(f"{name} {version}" for name, version in (e.get("versions") or {}).items())
    return [
        ("device", text(e.get("device_name") or e.get("processor"))),
        ("processes", text(e.get("processes"))),
        ("engine", text(e.get("engine"))),
        ("time in recorded steps", duration(sum(seconds)) if seconds else MISSING),
        ("tokens a second (median)", number(statistics.median(speed)) if speed else MISSING),
        ("MFU (median)", f"{statistics.median(mfu):.1%}" if mfu else MISSING),
        ("versions", versions or MISSING),
        ("commit", commit + (" with uncommitted changes" if e.get("uncommitted_changes") else "")),
    ]


def recipe_rows(subject: Subject) -> list[Row]:
    """The recipe's fields that decide the result; `recipe.yaml` has them all."""
    r = subject.recipe
    if r.get("stage") == "sft":
        names = ("data", "data_revision", "epochs", "batch_size", "max_length", "learning_rate", "warmup")
        names += ("weight_decay", "gradient_clip", "packing", "precision", "residual_dtype", "peft", "seed")
        return [(name.replace("_", " "), entry(r, name)) for name in names] + [("chat template", _template(subject))]
    optimizer, precision = r.get("optimizer") or {}, r.get("precision") or {}
    data = subject.environment.get("data") or {}
    rows = [("data", text(data.get("source"))), ("tokenizer", text(data.get("tokenizer")))]
    rows += [(name.replace("_", " "), entry(r, name)) for name in ("steps", "batch_size", "sequence_length")]
    for name in ("learning_rate", "final_learning_rate", "warmup", "weight_decay", "beta1", "beta2", "gradient_clip"):
        rows.append((name.replace("_", " "), entry(optimizer, name)))
    rows += [("precision", entry(precision, "mode")), ("residual dtype", entry(precision, "residual_dtype"))]
    return [*rows, ("data fingerprint", entry(r, "data_fingerprint")[:16]), ("seed", entry(r, "seed"))]


def _template(subject: Subject) -> str:
    """Which chat template a fine-tuning was trained with, and what ends an answer."""
    own = subject.summary.get("chat_template")
    if not isinstance(own, dict):
        return text(f"this project's; an answer ends with `{END_OF_TURN}`")
    return text(f"the model's own; an answer ends with `{own.get('answer_ends_with')}`")


def tokens_seen(subject: Subject) -> int | None:
    """Tokens up to the checkpoint: from the last record before it, else from the summary if it is the last step's."""
    counted = _column(subject, "tokens")
    if counted:
        return int(counted[-1])
    whole = subject.step is None or subject.step == subject.summary.get("step")
    return subject.summary.get("tokens") if whole else None


def final_loss(subject: Subject) -> float | None:
    """Mean training loss of the last tenth of the recorded steps, in nats a token, over the finite ones.

    Infinite if none was finite; None without a record.
    """
    losses = [r["loss"] for r in subject.metrics if "loss" in r]
    loss = steps.final_loss(losses)
    return None if not losses else math.inf if math.isnan(loss) else loss


def loss_in_words(loss: float | None) -> str:
    """A training loss as a number, or that it was not finite; MISSING for none."""
    return "not finite" if loss == math.inf else number(loss)


def outcome(subject: Subject) -> list[Row]:
    """Status, steps, tokens, losses, skipped steps, spikes."""
    s, skips = subject.summary, [r for r in subject.metrics if r.get("skip_kind")]
    recorded = bool(subject.metrics)
    kinds = {kind: sum(r["skip_kind"] == kind for r in skips) for kind in sorted({r["skip_kind"] for r in skips})}
    skipped = f"{len(skips)} of {len(subject.metrics):,}" if recorded else MISSING
    norms = [r.get("grad_norm") for r in subject.metrics]
    pretrained = subject.recipe.get("stage") == "pretrain"  # only there does a recipe define a spike
    spikes = len(spike_steps(range(len(norms)), norms, rules_of(subject.recipe))) if recorded and pretrained else None
    return [
        ("status of the run", text(s.get("status")) + (f": {text(s['reason'])}" if s.get("reason") else "")),
        ("steps of this checkpoint", number(subject.step if subject.step is not None else s.get("step"))),
        ("tokens", number(tokens_seen(subject))),
        ("training loss (mean of the last tenth)", loss_in_words(final_loss(subject))),
        ("skipped steps", skipped + (f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else "")),
        ("gradient spikes", number(spikes)),
    ]


# --- results -------------------------------------------------------------------------------------------------


def results(subject: Subject) -> list[dict[str, Any]]:
    """Every metric of the evaluations, with its data; C4's loss is the task `c4`."""
    found = []
    for record in subject.evaluations:
        harness = record.get("harness") or {}
        common = {name: record.get(name) for name in ("limit", "num_fewshot", "dtype", "dataset", "file")}
        common["harness"] = " ".join(str(harness[k]) for k in ("name", "version") if harness.get(k)) or None
        for entry in record.get("results") or []:
            if isinstance(entry.get("value"), (int, float)) and math.isfinite(entry["value"]):
                task = "c4" if record.get("kind") == "c4" else entry.get("task")
                found.append({**common, **entry, "task": task})
    return found


def best_results(subject: Subject) -> dict[tuple[str, str], dict[str, Any]]:
    """The result that counts, by task and metric: see `runkit.scores`."""
    found = results(subject)
    return {(r["task"], r.get("metric")): r for r in (found[at] for at in that_count(found))}


def mean_accuracy(subject: Subject) -> tuple[float, str, dict[str, float]] | None:
    """The plain mean of acc over the five benchmarks, or over the mini sets, in percent: its name, and each score.

    None where neither set is complete.
    """
    scores = {task: r for (task, metric), r in best_results(subject).items() if metric == "acc"}
    for suite, name in (("hub", f"mean of {COUNT}"), ("mini", f"mean of {COUNT} mini sets")):
        names = zip(TASKS, SUITES[suite], strict=True)
        rows = {task.name: scores[name_of] for task, name_of in names if name_of in scores}
        if len(rows) == len(TASKS):
            five = {task: 100 * row["value"] for task, row in rows.items()}
            return statistics.fmean(five.values()), f"{name}, {protocol(rows.values())}", five
    return None


def score_table(subject: Subject) -> str:
    """Accuracies in percent with their standard errors; losses in nats a token."""
    rows = []
    for r in results(subject):
        scale, unit = (100.0, " %") if r.get("metric") in ("acc", "acc_norm") else (1.0, "")
        digits = ".2f" if unit else ".4f"
        error = f" ± {scale * r['stderr']:{digits}}" if isinstance(r.get("stderr"), (int, float)) else ""
        items = number(r.get("n")) + (f" (limit {r['limit']})" if r.get("limit") else "")
        shots = text(r.get("num_fewshot")) if r.get("harness") else "-"
        value = f"{scale * r['value']:{digits}}{error}{unit}"
        rows.append((text(r["task"]), text(r.get("metric")), value, items, shots, text(r.get("dtype")), r["file"]))
    if not rows:
        return f"Scores: {MISSING}."
    return markdown(rows, ("task", "metric", "value ± standard error", "items", "examples", "dtype", "record"))


def siblings(subject: Subject) -> list[Subject]:
    """The runs next to this one whose recipes differ only in name and seed, including this one, by seed."""
    run = subject.run
    if run is None or not subject.recipe:
        return []
    inside = subject.parent is not None
    home = run.path.resolve().parent.parent if inside else run.path.resolve().parent
    found = []
    for folder in sorted(p for p in home.iterdir() if p.is_dir() and not p.name.startswith(".")):
        path = folder / run.path.resolve().name if inside else folder
        if not (path / "recipe.yaml").exists():
            continue
        other = Subject(None, RunFolder(path))
        fields = {line.split(":")[0] for line in differing_fields(subject.recipe, other.recipe)}
        if fields <= {"name", "seed", *(("model",) if inside else ())}:
            found.append(other)
    return sorted(found, key=lambda s: (str(s.recipe.get("seed")).zfill(9), s.run.path.name))


def seed_table(subject: Subject) -> str:
    """What became of every seed of this recipe in the same folder; empty where there is no other."""
    rows = []
    for other in siblings(subject):
        s, scores = other.summary, mean_accuracy(Subject(listed_checkpoint(other.run), other.run))
        mean = f"{scores[0]:.2f} % ({scores[1]})" if scores else MISSING
        status = text(s.get("status")) + (f": {text(s['reason'])}" if s.get("reason") else "")
        rows.append(
            (text(other.recipe.get("seed")), status, number(s.get("step")), loss_in_words(final_loss(other)), mean)
        )
    if not rows:
        return ""
    head = ("seed", "status", "steps", "training loss (mean of the last tenth)", "mean acc")
    gone = sum(row[1].startswith("diverged") for row in rows)
    return f"{markdown(rows, head)}\n\nDiverged: {gone} of {len(rows)}."


# --- FP16 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headroom:
    """The largest absolute value in the records and its place; infinite if it was not finite."""

    value: float
    where: str

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return f"none, it overflowed ({self.where})"
        return f"{FP16.headroom(self.value):.1f} bits (largest value {self.value:,.4g}: {self.where})"


def _read_statistics(files: list) -> pd.DataFrame | None:
    frames = []
    for file in files:
        try:
            frames.append(pd.read_parquet(file))
        except Exception as error:
            raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error
    return pd.concat(frames, ignore_index=True) if frames else None


def _worst(frame: pd.DataFrame | None) -> Headroom | None:
    if frame is None or not {"stat", "tensor", "layer", "sublayer", "step", "value"} <= set(frame):
        return None
    rows = frame[(frame.stat == "max_abs") & frame.tensor.isin(FP16_TENSORS)]
    if rows.empty:
        return None
    row = rows.loc[rows.value.astype(float).fillna(math.inf).idxmax()]
    return Headroom(
        float(row.value) if pd.notna(row.value) else math.inf,
        f"{row.tensor}, layer {int(row.layer)} {row.sublayer}, step {int(row.step)}",
    )


def training_headroom(subject: Subject) -> Headroom | None:
    """The least headroom at the recorded steps of training up to the checkpoint's, including the flight recorder's."""
    if subject.run is None:
        return None
    files = [f for folder in ("layers", "flight") for f in sorted((subject.run.path / folder).glob("step_*.parquet"))]
    frame = _read_statistics(files)
    if frame is not None and subject.step is not None and "step" in frame:
        frame = frame[frame.step <= subject.step]
    return _worst(frame)


def bench_headroom(subject: Subject) -> Headroom | None:
    """The same from the stability bench's measurement of this checkpoint."""
    file = _stability_file(subject, "step", ".parquet")
    return _worst(_read_statistics([file])) if file else None


def _stability_file(subject: Subject, prefix: str, suffix: str):
    if subject.run is None or subject.step is None:
        return None
    file = subject.run.path / "eval" / "stability" / f"{prefix}_{subject.step:08d}{suffix}"
    return file if file.exists() else None


def certificate(subject: Subject) -> str:
    """What the weights alone bound, in one sentence."""
    file = _stability_file(subject, "certificate", ".json")
    if file is None:
        return MISSING
    record = read_json(file)
    rows, open_ = record.get("rows") or [], record.get("unbounded") or []
    limit, largest = record.get("limit", FP16.largest), number(record.get("largest_bound"))
    bounded = [r for r in rows if isinstance(r.get("bound"), (int, float))]
    within = sum(r["bound"] * r.get("fp16_factor", 1.0) <= limit for r in bounded)  # the factor: FP16's own rounding
    said = f"{len(bounded)} of {len(rows)} tensors are bounded by the weights alone, {within} of them within "
    said += f"{number(limit)}; the largest bound is {largest}"
    return said + (f"; without a bound: {len(open_)}" if open_ else "")


def number_formats(subject: Subject) -> str:
    """The cheapest format of each target within 1 % of FP32's loss, as `eval.formats` measured this checkpoint."""
    if subject.run is None or subject.step is None:
        return MISSING
    file = subject.run.path / "eval" / "formats" / f"step_{subject.step:08d}" / "formats.json"
    found = read_json(file) if file.exists() else None
    cheapest = found.get("cheapest") if isinstance(found, dict) else None
    if not isinstance(cheapest, dict) or not cheapest:
        return MISSING
    return "; ".join(f"{target}: {name or 'none of those measured'}" for target, name in cheapest.items())


def stability_rows(subject: Subject) -> list[Row]:
    """FP16 headroom in training and on the bench, the certificate, number formats; no row where all are missing."""
    training, bench = training_headroom(subject), bench_headroom(subject)
    rows = [
        ("FP16 headroom in training", str(training or MISSING)),
        ("FP16 headroom on the stability bench", str(bench or MISSING)),
        ("FP16 certificate (from the weights)", certificate(subject)),
        ("Cheapest number formats within 1% of FP32's loss (emulated)", number_formats(subject)),
    ]
    return rows if any(value != MISSING for _, value in rows) else []


def verdict(subject: Subject) -> list[str]:
    """The stability bench's own sentences on this checkpoint; those on the run's course are with its last one."""
    file = subject.run.path / "eval" / "stability" / "stability.json" if subject.run is not None else None
    if file is None or not file.exists():
        return []
    record = read_json(file)
    if not isinstance(record, dict):
        return []
    entries = record.get("checkpoints") or []
    own = next((e for e in entries if e.get("step") == subject.step), None)
    # Without entries, or where the last of them is meant, the sentences are the file's own.
    said = record.get("verdict") if not entries or own is entries[-1] else (own or {}).get("verdict")
    return [" ".join(str(public(x)).split()) for x in said or []]
