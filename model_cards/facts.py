"""What the records say, as text for cards: every number from the run folder, "not measured" where there is none."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

import pandas as pd

from runkit.errors import UserError
from runkit.folder import RunFolder, read_json
from runkit.public import public
from runkit.recipes import differing_fields

from .subject import Subject

MISSING = "not measured"
FP16_MAX = 65504.0
FP16_TENSORS = ("stream", "residual_add", "branch")  # what is held in the residual stream's dtype
Row = tuple[str, str]


def number(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits, thousands apart; MISSING for what is none."""
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
        return [(name.replace("_", " "), text(r.get(name))) for name in names]
    optimizer, precision = r.get("optimizer") or {}, r.get("precision") or {}
    data = subject.environment.get("data") or {}
    rows = [("data", text(data.get("source"))), ("tokenizer", text(data.get("tokenizer")))]
    rows += [(name.replace("_", " "), text(r.get(name))) for name in ("steps", "batch_size", "sequence_length")]
    for name in ("learning_rate", "final_learning_rate", "warmup", "weight_decay", "beta1", "beta2", "gradient_clip"):
        rows.append((name.replace("_", " "), text(optimizer.get(name))))
    rows += [("precision", text(precision.get("mode"))), ("residual dtype", text(precision.get("residual_dtype")))]
    return [*rows, ("data fingerprint", text(r.get("data_fingerprint"))[:16]), ("seed", text(r.get("seed")))]


def tokens_seen(subject: Subject) -> int | None:
    """Tokens up to the checkpoint: of the last record before it, else the summary's where it is the last step's."""
    counted = _column(subject, "tokens")
    if counted:
        return int(counted[-1])
    whole = subject.step is None or subject.step == subject.summary.get("step")
    return subject.summary.get("tokens") if whole else None


def final_loss(subject: Subject) -> float | None:
    """Mean training loss of the last tenth of the recorded steps, in nats a token."""
    losses, steps = _column(subject, "loss"), len(subject.metrics)
    last = losses[-max(1, math.ceil(steps / 10)) :]
    return statistics.fmean(last) if last else None


def outcome(subject: Subject) -> list[Row]:
    """Status, steps, tokens, losses, skipped steps, spikes."""
    s, skips = subject.summary, [r for r in subject.metrics if r.get("skip_kind")]
    recorded = bool(subject.metrics)
    kinds = {kind: sum(r["skip_kind"] == kind for r in skips) for kind in sorted({r["skip_kind"] for r in skips})}
    skipped = f"{len(skips)} of {len(subject.metrics):,}" if recorded else MISSING
    loss = final_loss(subject)
    spikes = sum(bool(r.get("spike")) for r in subject.metrics) if recorded and "spike" in subject.metrics[-1] else None
    return [
        ("status of the run", text(s.get("status")) + (f": {text(s['reason'])}" if s.get("reason") else "")),
        ("steps of this checkpoint", number(subject.step if subject.step is not None else s.get("step"))),
        ("tokens", number(tokens_seen(subject))),
        ("training loss (mean of the last tenth)", number(loss) if loss is not None else MISSING),
        ("skipped steps", skipped + (f" ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})" if kinds else "")),
        ("gradient spikes", number(spikes)),
    ]


# --- results -------------------------------------------------------------------------------------------------


def results(subject: Subject) -> list[dict[str, Any]]:
    """Every metric of the evaluations, with what it was measured on; C4's loss is the task `c4`."""
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
    """The runs beside this one whose recipes differ in name and seed alone, this one among them, by seed."""
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
    """What became of every seed of this recipe that lies beside it."""
    rows = []
    for other in siblings(subject):
        s = other.summary
        scores = [r for r in results(other) if r.get("metric") == "acc"]
        mean = (
            f"{100 * statistics.fmean(r['value'] for r in scores):.2f} % ({len(scores)} tasks)" if scores else MISSING
        )
        loss = final_loss(other)
        status = text(s.get("status")) + (f": {text(s['reason'])}" if s.get("reason") else "")
        rows.append((text(other.recipe.get("seed")), status, number(s.get("step")), number(loss), mean))
    if not rows:
        return f"Seeds: {MISSING}."
    head = ("seed", "status", "steps", "training loss (mean of the last tenth)", "mean acc")
    gone = sum(row[1].startswith("diverged") for row in rows)
    return f"{markdown(rows, head)}\n\nDiverged: {gone} of {len(rows)}."


# --- FP16 ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headroom:
    """The largest absolute value of the records and where it was; bits are log2(65504 / value), -inf for no number."""

    value: float
    where: str

    @property
    def bits(self) -> float:
        if not math.isfinite(self.value):
            return -math.inf
        return math.log2(FP16_MAX / self.value) if self.value > 0 else math.inf

    def __str__(self) -> str:
        return f"{self.bits:.1f} bits (largest value {self.value:,.4g}: {self.where})"


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
    """The least headroom at the recorded steps of training, up to the checkpoint's."""
    if subject.run is None:
        return None
    files = sorted((subject.run.path / "layers").glob("step_*.parquet"))
    return _worst(_read_statistics([f for f in files if subject.step is None or _step_in(f.stem) <= subject.step]))


def bench_headroom(subject: Subject) -> Headroom | None:
    """The same of the stability bench's measurement of this checkpoint."""
    file = _stability_file(subject, "step", ".parquet")
    return _worst(_read_statistics([file])) if file else None


def _step_in(stem: str) -> int:
    name = stem.rpartition("_")[2]
    return int(name) if name.isdigit() else 0


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
    bounded = [r for r in rows if isinstance(r.get("bound"), (int, float))]
    largest = number(record.get("largest_bound"))
    within = sum(r["bound"] <= record.get("limit", FP16_MAX) for r in bounded)
    said = f"{len(bounded)} of {len(rows)} tensors are bounded by the weights alone, {within} of them within "
    said += f"{number(record.get('limit', FP16_MAX))}; the largest bound is {largest}"
    return said + (f"; without a bound: {len(open_)}" if open_ else "")


def stability_rows(subject: Subject) -> list[Row]:
    """FP16 headroom in training and on the bench, and the certificate."""
    training, bench = training_headroom(subject), bench_headroom(subject)
    return [
        ("FP16 headroom in training", str(training or MISSING)),
        ("FP16 headroom on the stability bench", str(bench or MISSING)),
        ("FP16 certificate (from the weights)", certificate(subject)),
    ]


def verdict(subject: Subject) -> list[str]:
    """The stability bench's own sentences."""
    file = subject.run.path / "eval" / "stability" / "stability.json" if subject.run is not None else None
    if file is None or not file.exists():
        return []
    record = read_json(file)
    said = record.get("verdict") or record.get("verdicts") or [] if isinstance(record, dict) else []
    return [text(x) for x in ([said] if isinstance(said, str) else said) if isinstance(x, str)]
