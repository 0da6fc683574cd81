"""Tensor, pipeline and fully sharded parallelism: the plans name what exists, and two processes compute as one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import INSIDE, NORMS_OF, OWN, SLIDING, random_ids, shaken_model
from torch import nn

from modeling_periln.arguments import CACHE
from modeling_periln.masks import masks_by_type

EVERY = [*NORMS_OF, "mix"]
MODELS = [
    *({"norm_placement": row} for row in ("normformer", "hybrid_star", "keel_first", "learned_residual")),
    {"norm_placement": OWN | INSIDE},
    SLIDING,
    *({"norm_placement": placement} for placement in EVERY),
    {"qk_norm": "head", "norm_type": "layernorm"},
    {"qk_norm": "full"},
    {"norm_placement": "post", "embedding_norm": True, "final_norm": True},
    {"norm_placement": "peri", "embedding_norm": False, "final_norm": False},
]
every_model = pytest.mark.parametrize("changes", MODELS, ids=lambda changes: ", ".join(map(str, changes.values())))


# Plans, in one process


@every_model
def test_every_rule_of_a_plan_names_modules_that_have_something_to_split(changes):
    model = shaken_model(**changes)
    names = {name: module for name, module in model.named_modules() if not isinstance(module, nn.Identity)}
    plans = [model.tp_plan]  # Transformers 5.4 leaves the head out of the pipeline's, and knows none for FSDP
    plans += [model.pp_plan] if "lm_head" in model.pp_plan else []
    plans += [model.fsdp_plan] if hasattr(model, "fsdp_plan") else []
    for plan in plans:
        assert len(plan) >= 3
        for rule in plan:
            pattern = re.compile(rule.replace(".", r"\.").replace("*", r"\d+"))
            found = [name for name in names if pattern.fullmatch(name)]
            assert len(found) == (3 if "*" in rule else 1), rule
            assert all(any(True for _ in names[name].parameters()) for name in found), rule


@every_model
def test_the_pipeline_plan_run_by_hand_is_the_model(changes):
    model, ids = shaken_model(**changes), random_ids()
    called = []
    for name, module in model.model.named_children():
        if not isinstance(module, (nn.Identity, nn.ModuleList)) and name != "rotary_emb":
            module.register_forward_hook(lambda *_, n=name: called.append(n))
    model.model.layers[0].register_forward_hook(lambda *_: called.append("layers"))
    expected = model(ids, use_cache=False).logits
    plan = model.config.base_model_pp_plan
    assert list(plan) == called  # every stage, in the order of the forward

    position_ids = torch.arange(ids.shape[1])[None]
    values = {"input_ids": ids, "attention_mask": None}
    for stage, (inputs, outputs) in plan.items():
        if "hidden_states" in inputs and "hidden_states" not in values:
            values["hidden_states"] = values["inputs_embeds"]
        given = [values[name] for name in inputs]
        module = model.model.get_submodule(stage)
        if isinstance(module, nn.ModuleList):
            types = model.model.layer_types
            rotations = model.model.rotary_emb.by_type(types, given[0], position_ids)
            masks = masks_by_type(types, None, config=model.config, inputs_embeds=given[0], **{CACHE: None})
            for kind, layer in zip(types, module, strict=True):
                more = {"position_embeddings": rotations[kind], "position_ids": position_ids}
                given[0] = layer(given[0], masks[kind], **more)
            (result,) = given[:1]
        else:
            result = module(*given)
        values[outputs[0]] = result
    if "lm_head" not in model.pp_plan:
        pytest.skip(f"transformers {transformers.__version__} leaves the head out of the pipeline's plan")
    (inputs, outputs) = model.pp_plan["lm_head"]
    assert outputs == ["logits"]
    assert torch.equal(model.lm_head(*(values[name] for name in inputs)), expected)


# Two processes


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[dict]]:
    """What both ranks report, by case."""
    folder = tmp_path_factory.mktemp("two_ranks")
    script = Path(__file__).resolve().with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder)],
        env={**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


def ranks(two_ranks, case: str) -> list[dict]:
    reports = two_ranks[case]
    assert len(reports) == 2
    assert not [r["error"] for r in reports if "error" in r]
    return reports


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["tp peri", "tp post", "tp tied layernorm", "tp full qk_norm", "tp own", "tp own, inside", "tp sliding"],
)
def test_tensor_parallel_logits_tokens_and_gradients_are_those_of_one_process(case, two_ranks):
    for report in ranks(two_ranks, case):
        assert report["sharded"] >= 3 * 7
        assert report["logits"] < 1e-5
        assert report["tokens"]
        assert report["all"]
        assert report["gradients"] < 1e-5 < report["size"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pp post", "pp pre", "pp peri", "pp own", "pp sliding"])
def test_pipeline_parallel_logits_and_tokens_are_those_of_one_process(case, two_ranks):
    for report in ranks(two_ranks, case):
        assert report["logits"] < 1e-5
        assert report["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fsdp peri", "fsdp post tied", "fsdp own", "fsdp by layer"])
def test_fully_sharded_gradients_of_two_halves_are_those_of_the_batch(case, two_ranks):
    """Each rank has half of the batch: the mean of their gradients is that of one process with all of it."""
    for report in ranks(two_ranks, case):
        assert report["sharded"] > 3 * 7
        assert report["logits"] < 1e-5
        assert report["all"]
        assert report["gradients"] < 1e-5 < report["size"]
