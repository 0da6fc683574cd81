"""Run folders as the stages write them, made up: what the report's tests are drawn from."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

TASKS = ("mini_arc_easy", "mini_hellaswag", "mini_piqa", "mini_social_iqa", "mini_winogrande")
WITHOUT_ACC_NORM = ("mini_social_iqa", "mini_winogrande")
LAYERS, STEPS, EVERY = 8, 200, 50


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def recipe(placement: str, learning_rate: float, seed: int, steps: int = STEPS) -> dict:
    return {
        "name": f"{placement}_lr{learning_rate:g}_seed{seed}",
        "data": "/home/somebody/data/tokens",
        "model": {"norm_placement": placement, "hidden_size": 64, "num_hidden_layers": LAYERS},
        "steps": steps,
        "batch_size": 8,
        "sequence_length": 128,
        "stage": "pretrain",
        "seed": seed,
        "optimizer": {"learning_rate": learning_rate, "warmup": 0.1},
        "precision": {"mode": "fp16", "residual_dtype": "float16"},
    }


def environment(layers: int = LAYERS) -> dict:
    add = {"stream": "float16", "branch": "float16", "output": "float16"}
    names = [f"model.layers.{i}.{part}_residual" for i in range(layers) for part in ("attn", "mlp")]
    return {
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu",
        "threads": 2,
        "processor": "Some CPU @ 2.0 GHz",
        "residual_adds": dict.fromkeys(names, add),
        "linear_outputs": {"float16": 7 * layers},
        "parameters": ["float32"],
        "gradients": ["float32"],
    }


def metrics(placement: str, learning_rate: float, seed: int, steps: int = STEPS, diverges_at: int | None = None):
    """Plausible records: a falling loss, two skipped steps, one gradient spike; a rise and NaN where it diverges."""
    rng = np.random.default_rng([seed, len(placement), int(learning_rate * 1e5)])
    floor = {"post": 4.4, "pre": 3.9, "peri": 3.8}.get(placement, 4.0)
    scale, total = 65536.0, 0
    for step in range(steps if diverges_at is None else diverges_at):
        loss = floor + (9.0 - floor) * np.exp(-step / 45) + rng.normal(0, 0.06)
        norm = 0.5 + 3 * np.exp(-step / 20) + abs(rng.normal(0, 0.08))
        norm += 20 if step == 120 and placement == "pre" else 0
        kind = None
        if step < 2:
            kind = "probe"
        if diverges_at is not None and step > diverges_at - 15:
            loss, norm = loss + 0.4 * (step - diverges_at + 15), norm * 1.3 ** (step - diverges_at + 15)
        if diverges_at is not None and step > diverges_at - 5:
            kind = "forward"
        if step == 150 and placement == "post":
            kind = "backward"
        total += kind is not None
        yield {
            "step": step,
            "loss": None if kind == "forward" else float(loss),
            "learning_rate": learning_rate * min(1.0, (step + 1) / 20),
            "grad_norm": None if kind else float(norm),
            "loss_scale": scale,
            "found_inf": kind is not None,
            "skip_kind": kind,
            "skips_consecutive": int(kind is not None),
            "skips_total": total,
            "tokens": (step + 1) * 1024,
        }
        scale = scale / 2 if kind else scale


def layer_rows(placement: str, learning_rate: float, seed: int, step: int, steps: int = STEPS) -> pd.DataFrame:
    """Plausible statistics of one step: the variance grows with depth as each placement lets it."""
    rng = np.random.default_rng([seed, len(placement), step])
    trained, rows = step / steps, []

    def add(layer: int, sublayer: str, tensor: str, **stats: float) -> None:
        rows.extend((step, layer, sublayer, tensor, stat, float(value)) for stat, value in stats.items())

    def activation(layer: int, sublayer: str, tensor: str, variance: float) -> None:
        variance *= rng.uniform(0.9, 1.1)
        add(layer, sublayer, tensor, mean_abs=0.8 * variance**0.5, variance=variance, max_abs=6 * variance**0.5)

    activation(0, "embedding", "stream", 1.0 if placement == "peri" else 4e-4)
    for layer in range(1, LAYERS + 1):
        for half, sublayer in ((0.5, "attn"), (0.0, "mlp")):
            depth = layer - half
            grown = {"post": 1.0, "pre": 0.02 * depth * np.exp(trained * depth * 0.8), "peri": 1 + 2 * depth}[placement]
            activation(layer, sublayer, "stream", grown)
            activation(layer, sublayer, "residual_add", 1.5 * grown)
            activation(layer, sublayer, "branch", 0.3 * grown * (1 + 40 * trained * learning_rate))
            add(layer, sublayer, "gradient", norm=0.1 * rng.uniform(0.8, 1.2), variance=1e-7)
            if placement == "peri":
                gamma = 1 - 0.3 * trained * depth / LAYERS
                add(layer, sublayer, "output_norm_gamma", mean=gamma, min=gamma - 0.1, max=gamma + 0.1)
        slope = {"post": 1.3**layer, "pre": 1.2**-layer, "peri": 1.0}[placement]
        add(layer, "layer", "gradient", norm=0.05 * slope * rng.uniform(0.8, 1.2), variance=1e-7 * slope)
    return pd.DataFrame(rows, columns=["step", "layer", "sublayer", "tensor", "stat", "value"])


def write_layers(run: Path, placement: str, learning_rate: float, seed: int, steps: list[int]) -> None:
    (run / "layers").mkdir(parents=True)
    for step in steps:
        layer_rows(placement, learning_rate, seed, step).to_parquet(run / "layers" / f"step_{step:08d}.parquet")


def write_scores(
    run: Path,
    accuracies: list[float],
    loss: float | None = None,
    limit: int | None = None,
    gold: list[float] | None = None,
) -> None:
    """eval/*.json: accuracies of the five mini tasks in [0, 1], a held-out loss, and bits a byte of right answers."""
    n = limit or 48
    results = []
    for task, value in zip(TASKS, accuracies, strict=True):
        stderr = (value * (1 - value) / (n - 1)) ** 0.5
        results.append({"task": task, "metric": "acc", "value": value, "stderr": stderr, "n": n})
        if task not in WITHOUT_ACC_NORM:
            results.append({"task": task, "metric": "acc_norm", "value": value / 2, "stderr": stderr, "n": n})
    for task, value in zip(TASKS, gold or [], strict=False):
        results.append({"task": task, "metric": "gold_bits_per_byte", "value": value, "stderr": 0.1, "n": n})
    head = {"evaluated": {"path": "/home/somebody/runs/x", "revision": None, "weights_sha256": "ab"}, "batch_size": 16}
    suite = {"harness": {"name": "lm-eval", "version": "0.4.13"}, "suite": "mini", "num_fewshot": 0, "limit": limit}
    write_json(run / "eval" / "benchmarks-mini.json", head | suite | {"dtype": "float32", "results": results})
    if loss is not None:
        heldout = [
            {"task": "heldout", "metric": "loss", "value": loss, "stderr": None, "n": 5000},
            {"task": "heldout", "metric": "bits_per_byte", "value": loss / 2, "stderr": None, "n": 5000},
        ]
        nothing = {"harness": None, "suite": None, "limit": None}
        write_json(run / "eval" / "heldout.json", head | nothing | {"dtype": "float32", "results": heldout})


def write_sample(run: Path, text: str, prompt: str = "The function returns") -> None:
    write_json(run / "eval" / "sample.json", {"evaluated": {}, "samples": [{"prompt": prompt, "text": text}]})


def write_run(
    root: Path, placement: str, learning_rate: float = 0.002, seed: int = 1, diverges_at: int | None = None
) -> Path:
    """One pretraining run with records and layer statistics, without evaluations."""
    run = root / f"{placement}_lr{learning_rate:g}_seed{seed}"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(placement, learning_rate, seed), sort_keys=False))
    end = STEPS if diverges_at is None else diverges_at
    write_layers(run, placement, learning_rate, seed, sorted({*range(0, end, EVERY), end}))
    lines = [json.dumps(record) for record in metrics(placement, learning_rate, seed, STEPS, diverges_at)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_json(run / "environment.json", environment())
    status = {"status": "completed", "reason": None}
    if diverges_at is not None:
        status = {"status": "diverged", "reason": "the loss was not finite for 10 steps in a row"}
    write_json(run / "summary.json", status | {"step": end, "tokens": 1024 * end, "parameters": 1500000})
    return run


def write_sft(run: Path, accuracies: list[float], status: str = "completed", limit: int | None = None) -> Path:
    """A fine-tuning run inside a pretraining run, evaluated."""
    sft = run / "sft"
    sft.mkdir()
    (sft / "recipe.yaml").write_text("stage: sft\nname: sft\nepochs: 2\n")
    write_json(sft / "summary.json", {"status": status, "step": 20})
    write_scores(sft, accuracies, limit=limit)
    return sft


def write_demo(root: Path, placements: tuple[str, ...] = ("post", "pre", "peri"), limit: int | None = None) -> Path:
    """A whole demo: two seeds at 0.002, one at 0.02 where Post-LN diverges."""
    root.mkdir(parents=True)
    demo = {"stage": "demo", "evaluation": {"suite": "mini", "limit": limit}, "text": {"source": "/home/somebody/text"}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(demo, sort_keys=False))
    rng = np.random.default_rng(0)
    for rate, seeds in ((0.002, (1, 2)), (0.02, (1,))):
        for placement in placements:
            for seed in seeds:
                diverges_at = 90 if (rate, placement) == (0.02, "post") else None
                run = write_run(root, placement, rate, seed, diverges_at)
                if diverges_at is None:
                    around = np.array([0.25, 0.25, 0.5, 1 / 3, 0.5])
                    write_scores(run, list((around + rng.normal(0, 0.05, 5)).round(4)), rng.uniform(3.8, 4.4), limit)
                    write_sample(run, " the value <b>of</b> the list & more\n    return x" * 3)
                    sft = write_sft(run, list((around + rng.normal(0, 0.05, 5)).round(4)), limit=limit)
                    write_sample(sft, "Put the egg in a pot.", "How do I boil an egg?")
    return root
