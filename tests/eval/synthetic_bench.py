"""Runs of any shape, and what the stability bench writes into them, made up."""

import json
import math
from pathlib import Path

import pandas as pd
import yaml

COLUMNS = ["step", "layer", "sublayer", "tensor", "stat", "value"]


def write_bench(run: Path, steps: list[int], layers: int, variance: float = 2.0) -> Path:
    """eval/stability/ of a run: statistics and angular distances of its checkpoints, a verdict and a certificate."""
    folder = run / "eval" / "stability"
    folder.mkdir(parents=True)
    for step in steps:
        rows = [(step, 0, "embedding", "stream", stat, 1.0) for stat in ("mean_abs", "variance", "max_abs")]
        for layer in range(1, layers + 1):
            for sublayer in ("attn", "mlp"):
                for tensor in ("stream", "residual_add", "branch"):
                    stats = {"mean_abs": 1.0, "variance": variance**layer, "max_abs": 10.0 * layer}
                    rows += [(step, layer, sublayer, tensor, stat, value) for stat, value in stats.items()]
                rows.append((step, layer, sublayer, "output_norm_gamma", "mean", 1.0))
            rows += [
                (step, layer, "layer", "gradient", "norm", 0.1),
                (step, layer, "layer", "gradient", "variance", 1e-6),
            ]
        rows += [(step, layers, "final", "stream", "max_abs", 1e6)]
        pd.DataFrame(rows, columns=COLUMNS).to_parquet(folder / f"step_{step:08d}.parquet")
        pairs = [(step, a, b, 0.02 * (b - a)) for a in range(layers + 1) for b in range(a + 1, layers + 1)]
        angles = pd.DataFrame(pairs, columns=["step", "layer", "other", "value"])
        angles.to_parquet(folder / f"angles_{step:08d}.parquet")
        bound = {"layer": 1, "sublayer": "mlp", "tensor": "residual_add", "bound": 99.0, "why": "rows", "measured": 4.0}
        free = {"layer": 1, "sublayer": "mlp", "tensor": "branch", "bound": None, "why": "no norm", "measured": 2.0}
        certificate = {"limit": 65504, "rows": [bound, free], "largest_bound": 99.0, "unbounded": [free]}
        (folder / f"certificate_{step:08d}.json").write_text(json.dumps(certificate))
    asked = {"data": "wikitext", "samples": 1000}
    entries = [{"step": step, "asked": asked, "predicted_tokens": 255000} for step in steps]
    said = {"model": run.name, "checkpoints": entries, "verdict": ["The stream's variance is exponential in depth."]}
    (folder / "stability.json").write_text(json.dumps(said))
    return folder


def write_any(
    root: Path,
    name: str,
    layers: int = 2,
    steps: int = 40,
    rate: float = 0.002,
    seed: int = 1,
    status: str = "completed",
    parameters: float | None = 1.2e6,
    every: int = 20,
    growth: float = 1.3,
    **fields,
) -> Path:
    """A run of any shape: `fields` replace fields of the recipe, `model` adds to its model section.

    The stream's largest value at layer l is `growth` to the power of l x step / 10.
    """
    run = root / name
    (run / "layers").mkdir(parents=True)
    model = {"norm_placement": "peri", "hidden_size": 8, "num_hidden_layers": layers} | fields.pop("model", {})
    recipe = {
        "name": name,
        "stage": "pretrain",
        "model": model,
        "steps": 40,
        "batch_size": 4,
        "sequence_length": 64,
        "seed": seed,
        "optimizer": {"learning_rate": rate, "warmup": 0.1},
        "precision": {"mode": "fp16"},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | fields))
    sizes = {} if parameters is None else {"parameters": parameters * 1.1, "parameters_non_embedding": parameters}
    (run / "summary.json").write_text(json.dumps({"status": status, "step": steps} | sizes))
    lines = []
    for step in range(steps):
        lost = status == "diverged" and step >= steps - 3
        record = {"step": step, "loss": None if lost else 5.0 - step / steps + 10 * rate, "loss_scale": 65536.0}
        record |= {"grad_norm": None if lost else 1.0 + 0.01 * (step % 3), "skip_kind": "forward" if lost else None}
        lines.append(json.dumps(record))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in sorted({*range(0, steps, every), steps}):
        rows = [(step, 0, "embedding", "stream", stat, 1.0) for stat in ("mean_abs", "variance", "max_abs")]
        for layer in range(1, layers + 1):
            peak = min(growth ** (layer * step / 10), 1e30)
            peak = peak if peak < 65504 else math.inf
            for sublayer in ("attn", "mlp"):
                for tensor in ("stream", "residual_add", "branch"):
                    stats = {"mean_abs": peak / 5, "variance": peak**2 / 20, "max_abs": peak}
                    rows += [(step, layer, sublayer, tensor, stat, value) for stat, value in stats.items()]
                rows.append((step, layer, sublayer, "output_norm_gamma", "mean", 1.0 - 0.001 * step))
            rows += [
                (step, layer, "layer", "gradient", "norm", 0.1),
                (step, layer, "layer", "gradient", "variance", 1e-6),
            ]
        pd.DataFrame(rows, columns=COLUMNS).to_parquet(run / "layers" / f"step_{step:08d}.parquet")
    return run
