"""The report's table and its sentences, from the records alone."""

from statistics import fmean
from typing import Any

import pandas as pd

from periln.eval.text_table import Table, signed

GOLD = "gold_bits_per_byte"  # lm-eval's name of no metric: our own, of every multiple-choice task
COLUMNS = ("model", "placement", "loss", "rise", "KL to the source", "same top token", "bits left in FP16", "massive")


def report_table(records: list[dict[str, Any]], notes: list[str]) -> Table:
    """A row a model: loss in nats a token, its rise over the source's, and what FP16 has left; then a row a format."""
    base = records[0]["loss"]
    rows, numbers = [], []
    for record in records:
        massive = record["massive_activations"]
        largest = max((m["largest"]["value"] for m in massive), default=None)
        numbers.append({
            "model": record["name"], "placement": record["placement"], "loss": record["loss"],
            "rise": record["loss"] - base, "kl": record["kl"], "top1": record["top1"],
            "headroom_bits": record["largest"]["headroom_bits"], "massive": len(massive), "massive_largest": largest,
        } | {f["row"]: f.get("rise_share") for f in record["formats"]}
          | {name: value for name, (value, _) in scores(record).items()})  # fmt: skip
        row = [
            record["name"],
            record["placement"],
            f"{record['loss']:.4f}",
            signed(record["loss"] - base, 4),
            "" if record["kl"] is None else f"{record['kl']:.4f}",
            "" if record["top1"] is None else f"{100 * record['top1']:.1f} %",
            f"{record['largest']['headroom_bits']:.1f}",
            "none" if not massive else f"{len(massive)}, to {largest:.3g}",
        ]
        asked = {name: shown for name, (_, shown) in scores(record).items()}
        rows.append(dict(zip(COLUMNS, row, strict=True)) | {f["row"]: _rise(f) for f in record["formats"]} | asked)
    notes = [*notes, *(f"{r['name']} has no scores: {r['tasks_failed']}" for r in records if "tasks_failed" in r)]
    text, frame = pd.DataFrame(rows).fillna(""), pd.DataFrame(numbers)
    text.insert(0, "", "What became of the source")
    return Table("Retrofit", text, frame, tuple(notes), csv=frame)


def scores(record: dict[str, Any]) -> dict[str, tuple[float | None, str]]:
    """By column: each task's score with its standard error, and the mean of the right answers' bits a byte.

    The score is the accuracy, in percent; of a task without one, its first metric, which the column names.
    """
    found: dict[str, tuple[float | None, str]] = {}
    rows = record.get("tasks", [])
    for task in dict.fromkeys(row["task"] for row in rows):
        of = [row for row in rows if row["task"] == task and row["metric"] != GOLD]
        row = next((row for row in of if row["metric"] == "acc"), of[0] if of else None)
        if row is None:
            continue
        scale, unit = (100, " %") if row["metric"] == "acc" else (1, "")
        error = "" if row["stderr"] is None else f" ± {scale * row['stderr']:.3g}"
        shown = "not finite" if row["value"] is None else f"{scale * row['value']:.4g}{error}{unit}"
        found[task if unit else f"{task}, {row['metric']}"] = row["value"], shown
    bits = [row["value"] for row in rows if row["metric"] == GOLD]
    if bits:
        mean = None if None in bits else fmean(bits)
        found["right answers, bits a byte"] = mean, "not finite" if mean is None else f"{mean:.3f}"
    return found


def _rise(found: dict[str, Any]) -> str:
    """What a format costs, as a share of the model's own loss."""
    if "missing" in found:
        return "not measured"
    return "not finite" if found["rise_share"] is None else f"{signed(100 * found['rise_share'], 2)} %"


def said(records: list[dict[str, Any]]) -> list[str]:
    """What the numbers say, a sentence a model."""
    source, found = records[0], []
    for record in records[1:]:
        rise = record["loss"] - source["loss"]
        bits = record["largest"]["headroom_bits"] - source["largest"]["headroom_bits"]
        much = f"{abs(bits):.1f} bits {'more' if bits >= 0 else 'less'} of FP16's range left"
        found.append(
            f"{record['name']}: the loss is {signed(rise, 3)} nats a token from the source's, KL {record['kl']:.3f}; "
            f"{much} (the largest value is in {record['largest']['where']})."
        )
    return found
