"""Redraw docs/results/published.md from the records next to it: `python docs/results/redraw_published.py`.

`--keep FOLDER` first takes the records that `make test-published` left in PUBLISHED_RECORDS, and
`--keep-formats FOLDER...` the table of folders of `periln formats`. Records are numbers; no weights, no texts are read.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS, FORMATS = HERE / "records" / "published", HERE / "records" / "formats"
TEXTS = ("WikiText-2", "C4", "LIMA")
PRECISIONS = ("original FP32", "cured FP32", "original BF16", "original FP16", "cured FP16")
PUBLISHED = {("smollm2-135m", "as it is"): "SmolLM2", ("gemma-3-270m", "as it is"): "Gemma 3"}
CURED = ("gemma-3-270m", "cured")
TINY = ("pre", "peri", "output", "pre_post", "post", "lns", "deepnorm")
LOW_BIT = {  # the rows that the two statements are tested on
    "activations": ("FP8 E4M3 per tensor", "FP8 E4M3 per token", "MXFP8", "INT8 per tensor", "INT8 per token")
    + ("INT4 per token", "MXFP4", "NVFP4"),
    "stream": ("FP8 E4M3", "FP8 E4M3 per token", "FP8 E5M2", "MXFP8", "INT8 per tensor", "INT8 per token"),
}
PLACES = {"weights": "weights", "activations": "activations", "stream": "stream", "kv": "KV cache", "recipes": "recipe"}


def read(name: str) -> dict[str, Any]:
    """A record; a missing one ends the script with its name."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        sys.exit(f"{path} is missing")
    return json.loads(path.read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else f"{value:{form}}"


def said(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def precisions() -> str:
    """KL, top-1 and perplexity in each precision, by text."""
    rows = []
    for text in TEXTS:
        found = read(f"gemma3_{text}")["rows"]
        for name in PRECISIONS:
            one = found[name]
            top = "" if one["top1"] is None else f"{100 * one['top1']:.2f} %"
            perplexity = "NaN" if one["perplexity"] is None else f"{one['perplexity']:.3f}"
            broken = f"{one['not_finite']:,} of {one['tokens']:,}"
            cells = [number(one["largest_difference"]), number(one["kl"], ".2e"), top, perplexity]
            rows.append([text if name == PRECISIONS[0] else "", name, broken, *cells])
    head = ["text", "model", "tokens with NaN", "largest difference of logits", "KL, nats a token", "same top token"]
    return table([*head, "perplexity"], rows)


def over_texts(name: str, key: str) -> float:
    """The mean over all compared tokens of the three texts."""
    found = [read(f"gemma3_{text}")["rows"][name] for text in TEXTS]
    return sum(one[key] * one["tokens"] for one in found) / sum(one["tokens"] for one in found)


def in_all(key: str) -> int:
    return sum(read(f"gemma3_{text}")[key] for text in TEXTS)


def tasks_table(record: dict[str, Any]) -> str:
    """Scores with their standard errors, a row a task and metric."""
    names = list(record["rows"])
    columns = {name: {(t, m): pair for t, m, *pair in record["rows"][name]["scores"]} for name in names}
    rows = [
        [f"{task}, {metric}", *(f"{columns[n][task, metric][0]:.3f} ± {columns[n][task, metric][1]:.3f}" for n in names)]
        for task, metric in columns[names[0]]
    ]
    rows.append(["items answered otherwise than in FP32", *(str(record["rows"][name]["changed"]) for name in names)])
    return table(["task", *names], rows)


def formats() -> list[dict[str, str]]:
    with (FORMATS / "formats.csv").open() as file:
        return list(csv.DictReader(file))


def base(model: str) -> float:
    about = json.loads((FORMATS / "about.json").read_text())["models"]
    return about[model]["fp32_bits_a_byte"]


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
    """KL against FP32 of the tiny models, a column a placement."""
    rows = [
        [f"{PLACES[group]}: {row}", *(number(kl(f"tiny-{name}", group, row), ".1e") for name in TINY)]
        for group, names in LOW_BIT.items()
        for row in names
    ]
    rows.append(["loss in FP32, bits a byte", *(f"{base(f'tiny-{name}'):.2f}" for name in TINY)])
    return table(["KL from FP32, nats", *(f"`{name}`" for name in TINY)], rows)


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
    words = {"lower": "lower with both seeds", "higher": "higher with both", "mixed": "lower with one, higher with the other"}
    return "; ".join(
        f"{words[side]} in {len(found)} of {total} ({'; '.join(found)})" for side, found in sides.items() if found
    )


def outliers() -> str:
    """What separate scales take away of INT8's loss, the published models."""
    rows = []
    for model, variant in PUBLISHED:
        for group in ("activations", "stream"):
            by = {r["row"]: r for r in formats() if (r["model"], r["variant"], r["group"]) == (model, variant, group)}
            cells = [loss(by[f"INT8 per {shared}"]) for shared in ("tensor", "token", "channel")]
            rows.append([f"{PUBLISHED[model, variant]}, {PLACES[group]}", *cells])
    return table(["INT8", "a scale per tensor", "per token", "per channel"], rows)


def keep(folder: Path) -> None:
    """Store the records of a measurement."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.glob("*.json")):
        (RECORDS / file.name).write_text(file.read_text())


def keep_formats(folders: list[Path]) -> None:
    """Put the rows of folders of `periln formats` in the place of those that their models have."""
    about = json.loads((FORMATS / "about.json").read_text())
    rows = formats()
    for folder in folders:
        head = json.loads((folder / "formats.json").read_text())
        name = folder.name
        rows = [row for row in rows if row["model"] != name]
        for row in head["rows"]:
            flat = {key: value for key, value in row.items() if not isinstance(value, (list, dict))}
            rows.append({"model": name} | {key: _cell(flat.get(key)) for key in rows[0] if key != "model"})
        whole = sum(head["reference"]["nats"]) / sum(head["sizes"]) / math.log(2)
        known = ("asked", "model_type", "cheapest", "said", "cure", "missing")
        asked = {key: value for key, value in head["asked"].items() if key != "data"}
        about["models"][name] = {key: head.get(key) for key in known} | {
            **{"asked": asked, "text": Path(head["asked"]["data"]).stem, "fp32_bits_a_byte": whole},
            "versions": {key: head["environment"]["versions"][key] for key in ("torch", "transformers")},
        }
    (FORMATS / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    with (FORMATS / "formats.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


PAGE = """# An overflowing checkpoint, cured

Gemma 3 270M cannot run in FP16: its residual stream passes 65504, and every logit is NaN. One command rewrites it by powers
of two. The function is the same to the bit in FP32, and the copy runs in FP16, also where the type of the original is
refused.

{summary}

All numbers are of **quantized weights, widened to FP32** with `periln widen`: the package index carries Gemma 3 270M as
Q4_K_M and SmolLM2-135M-Instruct as Q4_1. The original weights may give others. Except in vLLM, FP16 on the CPU is emulated
with a tensor core's numerics: FP16 operands, sums in FP32, results rounded to FP16.

## What was found

    periln bench gemma3 --quick --data wikitext-validation.txt

{bench}

{bench_time}

## The command

    periln cure gemma3 gemma3-fp16 --data wikitext-validation.txt

It scales {groups} groups of tensors by 2^{exponent}, the stream among them, and the epsilon of all norms by its square. Its
peaks come from {samples} samples of {tokens} tokens of WikiText-2's validation split; nothing below is measured on that
text. The stream's largest value is {peak:.3g} before and {after:.3g} afterwards, {headroom:.1f} bits below 65504.

## Before and after

Against the original in FP32, on windows of {window} tokens. One window in eight was compared in all precisions. The cured
model ran in FP16 on all {tokens_all:,} tokens, and {broken} of them have a logit that is not finite.

{precisions}

The cured model in FP16 is {nearer:.0f} times nearer to FP32 than the original in BF16, by KL over the three texts.

- **Lengths.** Texts of {lengths} tokens: all logits are finite.
- **Gradients.** One sample of 128 tokens: finite up to a loss scale of 2^{scale:.0f}. Beyond it, {beyond} overflows. {scales}
- **Training.** LoRA (rank 4, queries and values) in FP16 on one sample of LIMA, loss over {steps} steps: {lora}.

## Five tasks

    lm_eval --model hf --model_args pretrained=MODEL,dtype=DTYPE --tasks {task_names} --limit {limit}

lm-eval 0.4.13 as it is, zero-shot, on the first {limit} items of each task, {items} in all; the products of FP16 are emulated.

{tasks}

{tasks_said}

## vLLM in float16

{vllm}

## SmolLM2-135M

{smollm2}

## Which number formats survive

    periln formats MODEL --cure

By emulation: what is rounded is scaled, cast and cast back, and every product is computed in FP32. It says what a format does to
the numbers, never how fast it is. The loss above FP32's, with a 95 % interval over samples, each compared with itself in
FP32. WikiText-2's test split; {format_samples}.

{published_formats}

{cured_said}

**Do outliers decide?** In both models one channel of the first token is massive. One scale for a whole tensor spends its range on
that entry.

{outliers}

{outliers_said}

### Do output norms help?

Tiny models (6 layers, 128 wide, 300 steps on WikiText-2, learning rate 2e-3, 16 samples of 128 tokens), one for each of seven
placements, and KL from their own FP32:

{tiny}

`post` and `pre_post` are hardly better than a model that knows how frequent tokens are, so that nothing can break: their
columns say nothing. `sandwich`, `sub_ln`, `normformer`, `hybrid`, `keel`, `learned_residual` and `none` were not trained
for this table.

**Output norms help low-bit activations: {verdict_activations}.** KL of Peri-LN over that of Pre-LN, seeds 1 and 2:
{activations}.

**Output norms do not help the stream: {verdict_stream}.** The same for the stream: {stream}.

Two seeds of a tiny model decide little, and the two published models differ in much more than the placement.

## What was not measured

{missing}

## How to have these numbers again

    make test-published PUBLISHED_DATA=FOLDER

fetches both checkpoints with pip into `.published/` and measures them; [the tests' README](repo:tests/README.md) lists the
variables that raise how much. Measured on {dates} on one thread of a shared 2-core AMD EPYC CPU, torch {torch}, transformers
{transformers}. This page is drawn from `docs/results/records/published/` and `docs/results/records/formats/` by
`docs/results/redraw_published.py`.
"""
