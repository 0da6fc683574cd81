"""A real engine: vLLM, on a CPU in FP32, gives the greedy tokens that Transformers gives.

It has its own interpreter (`make test-vllm VLLM_PYTHON=/path/to/its/python`; docs/how-to/convert-and-serve.md
says how to install it).
Checkpoints as they are go through its Transformers backend, as remote code; exports run as its own architectures.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, shaken, shaken_model
from transformers import AutoModelForCausalLM

from modeling_periln.conversions import ARCHITECTURES
from modeling_periln.convert import main as periln_convert
from modeling_periln.placements import PLACEMENT_NAMES

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not VLLM_PYTHON, reason="VLLM_PYTHON names no interpreter that has vLLM (make test-vllm VLLM_PYTHON=...)"
    ),
]

# Heads of 32: the smallest that its attention kernels take. Two tensor-parallel ranks: two key/value heads.
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
# Unexported checkpoints: every placement, and the switches that change what an engine sees.
AS_THEY_ARE = {name: {"norm_placement": name} for name in PLACEMENT_NAMES} | {
    "layernorm-qk": {"norm_type": "layernorm", "qk_norm": "head"},
    "own": {"norm_placement": {"input_norm": True, "output_norm": True, "final_norm": True, "s": "1/sqrt(2L)"}},
    "frozen": {"output_norm_learnable": False},
    "frozen-layernorm": {"output_norm_learnable": False, "norm_type": "layernorm", "tie_word_embeddings": True},
    "tied": {"tie_word_embeddings": True, "norm_eps": {"attn_output_norm": 1e-2}},
}
TWO_RANKS = {"two-ranks-peri": {"qk_norm": "head"}, "two-ranks-post": {"norm_placement": "post"}}
# Exports: the source, the architecture, and the class that vLLM runs it with (for OLMo 2 it has none).
EXPORTS = {
    "export-llama": ({"norm_placement": "pre"}, "llama", "LlamaForCausalLM"),
    "export-llama-lns": ({"norm_placement": "lns"}, "llama", "LlamaForCausalLM"),
    "export-hyperclovax": ({}, "hyperclovax", "HyperCLOVAXForCausalLM"),
    "export-glm4": ({}, "glm4", "Glm4ForCausalLM"),
    "export-olmo2": ({"norm_placement": "output", "qk_norm": "full"}, "olmo2", "TransformersForCausalLM"),
}
# Imports of native models whose layers slide, served as ours: the window is shorter than the prompts.
SLIDES, SEES_ALL = "sliding_attention", "full_attention"
MIXED = {"sliding_window": 5, "layer_types": [SLIDES, SEES_ALL, SLIDES]}
ROPES = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ((SEES_ALL, 1e4), (SLIDES, 500.0))}
IMPORTS = {
    "import-mistral": ("mistral", {"sliding_window": 5}),
    "import-olmo3": ("olmo3", MIXED | {"hidden_size": 128, "rope_parameters": ROPES}),
    "import-gemma3": ("gemma3_text", MIXED | {"query_pre_attn_scalar": 20, "rope_parameters": ROPES}),
}
PROMPTS = [random_ids(1, length, SIZES["vocab_size"], seed=length)[0].tolist() for length in (3, 7, 12)]
NEW_TOKENS = 12


def greedy(path: Path) -> list[list[int]]:
    """Transformers' tokens, with the class that the checkpoint names."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    more = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return [model.generate(torch.tensor([p]), **more)[0, len(p) :].tolist() for p in PROMPTS]


def save_native(name: str, path: Path) -> None:
    target, fields = IMPORTS[name]
    other = ARCHITECTURES[target]
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    shaken(other.model_class(other.config_class(**{**SIZES, **ids, **fields})).eval()).save_pretrained(path)


@pytest.fixture(scope="module")
def served(request, tmp_path_factory) -> tuple[dict, dict]:
    """What vLLM gave for every checkpoint that a selected test asks for, and the tokens that are expected."""
    folder = tmp_path_factory.mktemp("vllm")
    wanted = {item.callspec.params["name"] for item in request.session.items if item.module is request.module}
    sources = AS_THEY_ARE | TWO_RANKS | {name: source for name, (source, *_) in EXPORTS.items()}
    jobs, expected = {}, {}
    for name in sorted(wanted & IMPORTS.keys()):
        native, path = folder / "natives" / name, folder / "models" / name
        save_native(name, native)
        expected[name] = greedy(native)
        path.parent.mkdir(exist_ok=True)
        assert periln_convert([str(native), str(path), "--to", "peri_llama", "--text", "none"]) == 0
        jobs[name] = {"path": str(path), "impl": "transformers", "ranks": 1}
    for name, changes in sources.items():
        if name not in wanted:
            continue
        path, impl = folder / "models" / name, "transformers"
        shaken_model(**SIZES, **changes).save_pretrained(path)
        expected[name] = greedy(path)
        if name in EXPORTS:
            source, path, impl = path, folder / "exports" / name, "auto"
            path.parent.mkdir(exist_ok=True)
            assert periln_convert([str(source), str(path), "--to", EXPORTS[name][1]]) == 0
            assert greedy(path) == expected[name]
        jobs[name] = {"path": str(path), "impl": impl, "ranks": 2 if name in TWO_RANKS else 1}
    work = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "jobs": jobs}
    (folder / "jobs.json").write_text(json.dumps(work))
    command = [VLLM_PYTHON, str(Path(__file__).with_name("vllm_tokens.py")), str(folder / "jobs.json")]
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    log = folder / "log.txt"
    with log.open("w") as file:  # from a folder where the package cannot be imported: the checkpoint's own code runs
        done = subprocess.run(command, stdout=file, stderr=file, cwd=folder, env=outside, check=False)
    assert done.returncode == 0, log.read_text()[-3000:]
    results = {}
    for name in jobs:
        file = folder / f"{name}.json"
        results[name] = json.loads(file.read_text()) if file.exists() else {"error": log.read_text()[-3000:]}
    return results, expected


@pytest.mark.parametrize("name", [*AS_THEY_ARE, *TWO_RANKS, *IMPORTS])
def test_a_checkpoint_is_served_as_it_is(name, served):
    results, expected = served
    assert "error" not in results[name], results[name]["error"]
    assert results[name] == {"tokens": expected[name], "class": "TransformersForCausalLM"}
    assert len({tuple(tokens) for tokens in expected[name]}) == len(PROMPTS)


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_served_as_its_architecture(name, served):
    results, expected = served
    assert "error" not in results[name], results[name]["error"]
    assert results[name] == {"tokens": expected[name], "class": EXPORTS[name][2]}
