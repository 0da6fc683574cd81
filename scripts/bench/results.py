"""What the bench makes of its times: ratios with intervals, verdicts, the table."""

from typing import Any

import numpy as np


def interval_of_ratio(ours: np.ndarray, theirs: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """Speed of ours in units of theirs, median(theirs) / median(ours), with its 95 % bootstrap interval over pairs."""
    pairs = np.array([ours, theirs])
    picks = np.random.default_rng(0).integers(0, pairs.shape[1], (resamples, pairs.shape[1]))
    drawn = np.median(pairs[:, picks], axis=-1)
    low, high = np.quantile(drawn[1] / drawn[0], [0.025, 0.975])
    ours, theirs = np.median(pairs, axis=1)
    return float(theirs / ours), float(low), float(high)


def verdict(result: dict[str, Any]) -> str:
    """Whether the target is met or missed by the whole interval, or (with `?`) by the ratio alone."""
    low, high = result["interval"]
    bound = result.get("at_most") or result.get("at_least")
    if bound is None:
        return ""
    better = (lambda ratio: ratio <= bound) if result.get("at_most") else (lambda ratio: ratio >= bound)
    sure = better(low) == better(high)
    return ("met" if better(result["ratio"]) else "missed") + ("" if sure else "?")


def table(record: dict[str, Any]) -> str:
    """The results as a Markdown table, with what they were measured on."""
    machine = record["environment"]
    name = machine["device_name"] or f"{machine['processor']}, {machine['threads']} threads"
    versions = ", ".join(f"{p} {machine['versions'][p]}" for p in ("torch", "transformers"))
    lines = [
        "| what | against | tokens | pairs | ratio | 95 % interval | asked for | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in record["cases"].values():
        asked = f"≥ {result['at_least']}" if result.get("at_least") else ""
        asked = f"≤ {result['at_most']}" if result.get("at_most") else asked
        low, high = result["interval"]
        tokens, pairs = f"{result['batch']} × {result['sequence']}", str(result["pairs"])
        tokens += f" + {result['new_tokens']}" if result.get("new_tokens") else ""
        ratio, interval = f"{result['ratio']:.3f}", f"{low:.3f} to {high:.3f}"
        cells = (result["what"], result["against"], tokens, pairs, ratio, interval, asked)
        lines.append("| " + " | ".join((*cells, verdict(result))) + " |")
    note = "Ratio: speed of ours over theirs (for memory: bytes). `?`: by the median; the interval holds both."
    return "\n".join([*lines, "", f"{name}; {versions}. {note}"])
