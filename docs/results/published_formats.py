"""The tables of number formats in published.md, from `records/formats/`; `redraw_published.py` draws the page."""

import csv
import json
import math
from pathlib import Path
from typing import Any

FORMATS = Path(__file__).parent / "records" / "formats"
PUBLISHED = {("smollm2-135m", "as it is"): "SmolLM2", ("gemma-3-270m", "as it is"): "Gemma 3"}
CURED = ("gemma-3-270m", "cured")
TINY = (
    *("pre", "peri", "sandwich", "output", "lns", "sub_ln", "normformer", "hybrid", "hybrid_star", "keel"),
    *("keel_first", "deepnorm", "pre_post", "mix", "post", "learned_residual", "none"),
)
LOW_BIT = {  # the rows that the two statements are tested on
    "activations": (
        *("FP8 E4M3 per tensor", "FP8 E4M3 per token", "MXFP8", "INT8 per tensor", "INT8 per token"),
        *("INT4 per token", "MXFP4", "NVFP4"),
    ),
    "stream": ("FP8 E4M3", "FP8 E4M3 per token", "FP8 E5M2", "MXFP8", "INT8 per tensor", "INT8 per token"),
}
PLACES = {"weights": "weights", "activations": "activations", "stream": "stream", "kv": "KV cache", "recipes": "recipe"}


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def formats() -> list[dict[str, str]]:
    with (FORMATS / "formats.csv").open() as file:
        return list(csv.DictReader(file))


def base(model: str) -> float:
    about = json.loads((FORMATS / "about.json").read_text())["models"]
    return about[model]["fp32_bits_a_byte"]


def samples() -> str:
    """What the published models were measured on."""
    about = json.loads((FORMATS / "about.json").read_text())["models"]
    asked = {name: about[model]["asked"] for (model, _), name in PUBLISHED.items()}
    return "; ".join(f"{name}: {a['samples']} samples of {a['tokens']} tokens" for name, a in asked.items())


def loss(row: dict[str, str] | None) -> str:
    """`+0.5 % (0.3 to 0.7)`, or what became of it."""
    if row is None:
        return ""
    if not row["rise"]:
        return row["first"] or "not finite"
    whole = base(row["model"])
    low, high = (100 * float(row[key]) / whole for key in ("rise_low", "rise_high"))
    mean = 100 * float(row["rise"]) / whole
    digits = ".0f" if abs(mean) >= 10 else ".2f"
    return f"{mean:+{digits}} % ({low:{digits}} to {high:{digits}})"


def published_formats() -> str:
    """Loss above FP32's in each format, the published models."""
    every = formats()
    by = {(row["model"], row["variant"], row["group"], row["row"]): row for row in every}
    keys = dict.fromkeys((r["group"], r["row"]) for r in every if r["model"] == "smollm2-135m")
    columns = [*PUBLISHED, CURED]
    rows = [
        [f"{PLACES[group]}: {row}", *(loss(by.get((*column, group, row))) for column in columns)] for group, row in keys
    ]
    return table(["rounded", *PUBLISHED.values(), "Gemma 3, cured"], rows)


def kl(model: str, group: str, row: str) -> float | None:
    for one in formats():
        if (one["model"], one["variant"], one["group"], one["row"]) == (model, "as it is", group, row):
            return float(one["kl"])
    return None


def tiny_formats() -> str:
    """KL against FP32 of the tiny models, a row a placement, and their loss."""
    tables = []
    for group, names in LOW_BIT.items():
        rows = []
        for name in TINY:
            cells = [number(kl(f"tiny-{name}", group, row), ".1e") for row in names]
            rows.append([f"`{name}`", f"{base(f'tiny-{name}'):.2f}", *cells])
        tables.append(table([PLACES[group], "loss", *names], rows))
    return "\n\n".join(tables)


def ratios(group: str) -> dict[str, list[float]]:
    """Peri-LN's KL over Pre-LN's by row, a number a seed."""
    found = {}
    for row in LOW_BIT[group]:
        pairs = [(kl(f"tiny-peri{seed}", group, row), kl(f"tiny-pre{seed}", group, row)) for seed in ("", "-seed2")]
        found[row] = [a / b for a, b in pairs if a is not None and b is not None]
    return found


def statement(group: str) -> str:
    """What the two seeds say: `lower with both seeds in 5 of 8 (...), higher in 2 (...), mixed in 1 (...)`."""
    sides: dict[str, list[str]] = {"lower": [], "higher": [], "mixed": []}
    for row, values in ratios(group).items():
        side = "lower" if max(values) < 1 else "higher" if min(values) > 1 else "mixed"
        sides[side].append(f"{row} {', '.join(f'{value:.2f}' for value in values)}")
    total = len(LOW_BIT[group])
    words = {
        "lower": "lower with both seeds",
        "higher": "higher with both",
        "mixed": "lower with one, higher with the other",
    }
    return "; ".join(
        f"{words[side]} in {len(found)} of {total} ({'; '.join(found)})" for side, found in sides.items() if found
    )


def verdict(group: str, helps: bool) -> str:
    """Whether the statement that output norms help (or do not) holds: in all rows, in some, or in none."""
    values = list(ratios(group).values())
    fits = sum((max(v) < 1) if helps else (min(v) > 1) for v in values)
    against = sum((min(v) > 1) if helps else (max(v) < 1) for v in values)
    if fits == len(values):
        return "it holds in every row"
    if not fits:
        return "it does not hold"
    return f"it holds in {fits} of {len(values)} rows, and is contradicted in {against}"


def outliers() -> str:
    """What separate scales take away of INT8's loss, the published models."""
    rows = []
    for model, variant in PUBLISHED:
        for group in ("activations", "stream"):
            by = {r["row"]: r for r in formats() if (r["model"], r["variant"], r["group"]) == (model, variant, group)}
            cells = [loss(by[f"INT8 per {shared}"]) for shared in ("tensor", "token", "channel")]
            rows.append([f"{PUBLISHED[model, variant]}, {PLACES[group]}", *cells])
    return table(["INT8", "a scale per tensor", "per token", "per channel"], rows)


def cured_said() -> str:
    """Which rows changed by the cure."""
    every = {(r["group"], r["row"], r["variant"]): r for r in formats() if r["model"] == CURED[0]}
    after = [key for key in every if key[2] == CURED[1]]
    if not after:
        return "The cured model was not measured."
    mended = [
        f"{PLACES[g]} {row}"
        for g, row, _ in after
        if every[g, row, CURED[1]]["rise"] and not every[g, row, "as it is"]["rise"]
    ]
    return (
        "After the cure, in memory, plain casts were measured again (a shared scale follows powers of two).\n"
        f"Finite afterwards and not before: {', '.join(mended) or 'none'}."
    )


def keep_formats(folders: list[Path]) -> None:
    """Take the rows of folders of `periln formats`, in the place of the same rows; others of the same samples stay."""
    about = json.loads((FORMATS / "about.json").read_text())
    rows = {_key(row): row for row in formats()}
    for folder in folders:
        head, name = json.loads((folder / "formats.json").read_text()), folder.name
        asked = {key: value for key, value in head["asked"].items() if key != "data"}
        before = about["models"].get(name, {})
        if before and before["asked"] != asked:
            rows = {key: row for key, row in rows.items() if key[0] != name}
            before = {}
        for row in head["rows"]:
            cells = {key: _cell(row.get(key)) for key in next(iter(rows.values())) if key != "model"}
            rows[_key({"model": name} | cells)] = {"model": name} | cells
        whole = sum(head["reference"]["nats"]) / sum(head["sizes"]) / math.log(2)
        known = {
            "asked": asked,
            "model_type": head["model_type"],
            "cure": head.get("cure"),
            "missing": head.get("missing", {}),
        }
        about["models"][name] = (
            {"text": Path(head["asked"]["data"]).stem} | before | known | {"fp32_bits_a_byte": whole}
        )
    (FORMATS / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    with (FORMATS / "formats.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, next(iter(rows.values())).keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows, key=lambda key: key[0]))


def _key(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["model"], row["variant"], row["group"], row["row"]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
