"""A small plan, and results of its cells as a trained study would leave them."""

import json
from pathlib import Path
from typing import Any

from periln.runkit.studies import CELLS, Study, freeze

CLAIMS = Path(__file__).parents[1] / "eval" / "study" / "claims.yaml"
RATES = (0.001, 0.01, 0.1)
SEEDS = (1, 2, 3, 4, 5)
LOSS = {"post": 4.3, "pre": 4.2, "peri": 4.1}


def plan() -> dict[str, Any]:
    """E2 alone: three placements, three rates, five seeds."""
    cells = [
        {
            "name": f"e2_{variant}_rate-{rate:g}_seed{seed}",
            "group": "E2",
            "variant": variant,
            "block": f"rate {rate:g}",
            "seed": seed,
            "size": "tiny",
            "tokens": 1536,
            "rate": rate,
            "like": None,
            "seconds": 10.0,
            "fields": {
                "model": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 32,
                    "vocab_size": 300,
                    "norm_placement": variant,
                },
                "seed": seed,
                "steps": 12,
                "batch_size": 4,
                "sequence_length": 32,
                "layer_stats_every": 4,
                "heldout_every": 3,
                "checkpoint_every": 3,
            },
        }
        for seed in SEEDS
        for rate in RATES
        for variant in LOSS
    ]
    data = {"path": "data", "source": "installed-python", "vocab_size": 300, "max_bytes": 200_000, "context": 64}
    return {
        "study": 1,
        "budget": "1m",
        "workers": 1,
        "device": "cpu",
        "size": "tiny",
        "seeds": list(SEEDS),
        "rates": list(RATES),
        "data": data,
        "recipe": {"device": "cpu", "trackers": [], "flight": {"steps": 0}, "keep_last": 1, "heldout_sequences": 8},
        "cells": cells,
    }


def result(cell: dict[str, Any], plan_hash: str) -> dict[str, Any]:
    """A cell's result: Peri-LN has the lowest loss; at the highest rate Pre-LN diverges; layers differ by placement."""
    variant, rate, seed = cell["variant"], cell["rate"], cell["seed"]
    lost = variant == "pre" and rate == 0.1
    loss = LOSS[variant] + abs(rate - 0.01) + 0.01 * seed + 0.001 * ((seed * 7 + len(variant)) % 5)
    layers = range(1, 9)
    variance = {"post": [1.0] * 8, "pre": [2.0**n for n in layers], "peri": [1.0 * n for n in layers]}[variant]
    return {
        "cell": cell["name"],
        "plan": plan_hash,
        **{name: cell[name] for name in ("group", "variant", "block", "seed", "size", "tokens", "rate")},
        "status": "diverged" if lost else "completed",
        "reason": None,
        "steps": 1000,
        "planned_steps": 1000,
        "parameters": 30_000,
        "parameters_non_embedding": 20_000,
        "data": "one",
        "commit": "0" * 40,
        "uncommitted_changes": False,
        "seconds": 10.0,
        "heldout_loss": None if lost else round(loss, 5),
        "heldout": [],
        "loss": [[0, 5.7], [500, loss]],
        "grad_norm": [[0, 1.0], [500, 0.5]],
        "initial_loss": 5.7,
        "spikes": {"post": 3, "pre": 5, "peri": 1}[variant] + seed % 2,
        "headroom": {"stream": {"post": 12.0, "pre": 4.0, "peri": 9.0}[variant] + 0.1 * seed},
        "overflow": lost,
        "variance": {"0": [1.0, *[1.0] * 8], "1000": [1.0, *variance]},
        "gradient": {"0": [1.0] * 8, "1000": [1.0] * 8},
        "gamma": {},
    }


def make(folder: Path, cells: int | None = None) -> Study:
    """A frozen study with the results of its first `cells` cells (None: all) as exported records."""
    freeze(folder, plan(), CLAIMS.read_text())
    study = Study(folder)
    lines = [json.dumps(result(cell, study.plan_hash)) for cell in study.cells[:cells]]
    (folder / CELLS).write_text("".join(f"{line}\n" for line in lines))
    return study
