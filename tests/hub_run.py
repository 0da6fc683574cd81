"""A run folder with real checkpoints of a tiny model, and every kind of record that a card reads."""

import json
from pathlib import Path

import pandas as pd
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import modeling_periln
from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from periln.runkit.checkpoints import write_checkpoint

WORDS = ["the", "a", "of", "to", "in", "is", "function", "returns", "value", "egg", "boil", "how", "do", "hello"]
SPECIAL = ["<|endoftext|>", "<|user|>", "<|end|>"]
CHAT = (
    "{% for m in messages %}<|user|> {{ m['content'] }} <|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>{% endif %}"
)
HUB_TASKS = ("arc_easy", "hellaswag", "piqa", "social_iqa", "winogrande")
STEPS = (4, 8)
LIMIT = 65504
# What a checkpoint carries of the package: the model, and never what converts it or registers it.
NEVER_CARRIED = {
    *("__init__.py", "convert.py", "convert_options.py", "conversions.py", "proof.py", "refresh.py", "sources.py"),
    *("admission.py", "architectures.py", "pipes.py", "version.py"),
}
CODE = {p.name for p in Path(modeling_periln.__file__).parent.glob("*.py")} - NEVER_CARRIED


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=SPECIAL[0], eos_token=SPECIAL[0], pad_token=SPECIAL[2]
    )
    made.chat_template = CHAT
    return made


def model(seed: int = 0, **changes) -> PeriLlamaForCausalLM:
    """Two layers, hidden size 32; every weight drawn, so that no norm is hidden by a gamma of 1."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    more = {"num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    made = PeriLlamaForCausalLM(PeriLlamaConfig(**{**sizes, **more, "norm_placement": "peri", **changes})).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(1 + 0.3 * torch.randn_like(weight) if weight.ndim == 1 else 0.3 * torch.randn_like(weight))
    return made


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def recipe(placement: str, seed: int) -> dict:
    return {
        "name": f"{placement}_seed{seed}",
        "data": "/home/somebody/data/tokens",
        "model": {"norm_placement": placement, "hidden_size": 32, "num_hidden_layers": 2},
        "steps": STEPS[-1],
        "batch_size": 4,
        "sequence_length": 16,
        "stage": "pretrain",
        "seed": seed,
        "optimizer": {"learning_rate": 0.002, "final_learning_rate": 0.1, "warmup": 0.1, "weight_decay": 0.033},
        "precision": {"mode": "fp16", "residual_dtype": "float16"},
        "data_fingerprint": "5af0c1",
    }


def write_scores(run: Path, step: int = STEPS[-1], tasks: tuple[str, ...] = HUB_TASKS, file: str = "hub") -> None:
    results = []
    for i, task in enumerate(tasks):
        results.append({"task": task, "metric": "acc", "value": 0.3 + 0.05 * i, "stderr": 0.01, "n": 1000 + i})
    head = {"evaluated": {"path": f"/home/somebody/runs/x/checkpoints/step_{step:08d}", "weights_sha256": "ab"}}
    more = {"harness": {"name": "lm-eval", "version": "0.4.13"}, "suite": "hub", "num_fewshot": 0, "limit": None}
    write_json(run / "eval" / f"benchmarks-{file}.json", head | more | {"dtype": "float32", "results": results})


def write_stability(run: Path) -> None:
    folder = run / "eval" / "stability"
    row = {"step": STEPS[-1], "layer": 2, "sublayer": "mlp", "tensor": "residual_add", "stat": "max_abs", "value": 8.0}
    folder.mkdir(parents=True)
    pd.DataFrame([row]).to_parquet(folder / f"step_{STEPS[-1]:08d}.parquet")
    rows = [
        {"layer": 1, "sublayer": "attn", "tensor": "stream", "bound": 100.0, "why": "RMSNorm", "measured": 3.0},
        {"layer": 1, "sublayer": "mlp", "tensor": "branch", "bound": None, "why": "no norm", "measured": 3.0},
    ]
    certificate = {"limit": LIMIT, "rows": rows, "largest_bound": 100.0, "unbounded": ["layer 1 mlp branch"]}
    write_json(folder / f"certificate_{STEPS[-1]:08d}.json", certificate)
    write_json(folder / "stability.json", {"model": "/home/somebody/x", "verdict": ["The variance grows linearly."]})


def write_run(root: Path, placement: str = "peri", seed: int = 1, status: str = "completed", **changes) -> Path:
    """A pretraining run with two checkpoints, metrics, statistics, evaluations, a certificate and a figure."""
    run = root / f"{placement}_seed{seed}"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(placement, seed), sort_keys=False))
    for i, step in enumerate(STEPS):
        made = model(seed=10 * seed + i, norm_placement=placement, **changes)
        with write_checkpoint(run / "checkpoints" / f"step_{step:08d}", made, tokenizer()) as folder:
            (folder / "trainer_state").mkdir()
            (folder / "trainer_state" / "optimizer.safetensors").write_bytes(b"never sent")
    environment = {
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "0123abcd",
        "device": "cpu",
        "processor": "Some CPU @ 2.0 GHz",
        "processes": 1,
        "engine": "single",
        "data": {"source": "hf:acme/text", "tokenizer": "cl100k_base", "tokens": 10**6},
        "note": "from /home/somebody/clone/scripts",
    }
    write_json(run / "environment.json", environment)
    keys = {"grad_norm": 0.5, "skip_kind": None, "spike": False, "tokens_per_second": 1000.0, "step_seconds": 1.5}
    lines = [{"step": s, "loss": 3.0 - 0.1 * s, "tokens": 64 * (s + 1)} | keys for s in range(STEPS[-1])]
    lines[0]["skip_kind"] = "probe"
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reason = "the loss was not finite for 10 steps in a row" if status == "diverged" else None
    summary = {"status": status, "reason": reason, "step": STEPS[-1], "tokens": 64 * STEPS[-1], "host": "myhost"}
    write_json(run / "summary.json", summary | {"parameters": 14304, "parameters_non_embedding": 12768})
    (run / "layers").mkdir()
    row = {"layer": 1, "sublayer": "mlp", "tensor": "stream", "stat": "max_abs", "value": 16.0}
    for step in (0, *STEPS):
        pd.DataFrame([{"step": step} | row]).to_parquet(run / "layers" / f"step_{step:08d}.parquet")
    if status == "completed":
        write_scores(run)
        loss = {"task": "heldout", "metric": "loss", "value": 2.25, "stderr": None, "n": 50}
        where = {"evaluated": {"path": f"checkpoints/step_{STEPS[-1]:08d}"}, "harness": None, "suite": None}
        write_json(run / "eval" / "heldout.json", where | {"limit": None, "dtype": "float32", "results": [loss]})
        write_stability(run)
    (run / "figures").mkdir()
    (run / "figures" / "headroom.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    return run
