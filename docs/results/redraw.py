"""Redraw docs/results/published.md from the records next to it: `python docs/results/redraw.py`.

The records are numbers that `make test-published` or the commands in them wrote; no weights are read.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records"

HEAD = """# An overflowing checkpoint, cured

Gemma 3 270M in FP16 gives NaN for every token: its residual stream outgrows 65504. One command rewrites it by powers of
two. The function stays, and the copy runs in FP16.

All numbers are of the quantized weights that the package index carries (Gemma: Q4_K_M, SmolLM2: Q4_1), widened to FP32
with `periln widen`. The original weights may give others. FP16 is emulated on a CPU with a tensor core's numerics: FP16
operands, sums in FP32, results rounded to FP16.
"""


def read(name: str) -> dict[str, Any]:
    """A record; a missing one ends the script with its name."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        sys.exit(f"{path} is missing")
    return json.loads(path.read_text())


def number(value: float | None, digits: int = 3) -> str:
    return "NaN" if value is None else f"{value:.{digits}g}"


def found(bench: dict[str, Any]) -> str:
    lines = "\n".join(f"- {sentence}" for sentence in bench["verdict"])
    return f"## What was found\n\n    {bench['command']}\n\n{lines}\n"


def command(cure: dict[str, Any]) -> str:
    moved = cure["exponents"]
    stream = f", the stream by 2^{moved['stream']}" if "stream" in moved else ""
    after = cure["after"]
    return f"""## The command

    {cure["command"]}

It scales {len(moved)} groups of tensors by powers of two{stream}. On its own samples the rewritten model is finite in
FP16, forward and backward, up to a loss scale of {after["largest_finite_loss_scale"]:g}; before it,
{cure["before"]["forward"]["where"]} was not.
"""


def beside(comparison: dict[str, Any]) -> str:
    rows = comparison["rows"]
    lines = []
    for name, row in rows.items():
        broken = row["not_finite"]
        top = "" if row["top1"] is None else f"{100 * row['top1']:.1f} %"
        kl = number(row["kl"]) if row["kl"] is not None else ""
        largest = number(row["largest_difference"]) if row["largest_difference"] is not None else ""
        perplexity = f"{row['perplexity']:.3f}" if row["perplexity"] is not None else "NaN"
        lines.append(f"| {name} | {broken} of {row['tokens']} | {largest} | {kl} | {top} | {perplexity} |")
    table = "\n".join(lines)
    return f"""## Before and after

Against the original in FP32, {comparison["data"]}:

| | tokens with NaN | largest difference of logits | KL, nats a token | same top token | perplexity |
|---|---:|---:|---:|---:|---:|
{table}
"""


def foot(*records: dict[str, Any]) -> str:
    versions = records[0]["versions"]
    dates = sorted({record["date"] for record in records})
    said = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    return f"""## How to have these numbers again

    make test-published

fetches both checkpoints with pip into `.published/` and measures them; `PUBLISHED_TOKENS`, `PUBLISHED_LENGTH` and
`PUBLISHED_LIMIT` raise how much. Measured on {", ".join(dates)} with {said}, on a CPU.
This page is drawn from `docs/results/records/` by `docs/results/redraw.py`.
"""


def main() -> None:
    bench, cure, comparison = read("gemma3_bench"), read("gemma3_cure"), read("gemma3_precisions")
    parts = [HEAD, found(bench), command(cure), beside(comparison), foot(bench, cure, comparison)]
    (HERE / "published.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
