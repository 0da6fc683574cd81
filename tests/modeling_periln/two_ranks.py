"""What two processes compute with a model that is spread over them. Started with torchrun by `test_parallel_plans`.

    PYTHONPATH=. torchrun --nproc-per-node 2 tests/modeling_periln/two_ranks.py FOLDER

Rank 0 writes FOLDER/report.json: for each case the largest differences from one process's logits and gradients (over
both ranks), or the error.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import INSIDE, OWN, SLIDING, random_ids, shaken_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from modeling_periln import PeriLlamaForCausalLM

# Both ranks see the same batch, or each its half.
CASES = {
    "tp peri": ({"tp_size": 2}, {"qk_norm": "head"}),
    "tp post": ({"tp_size": 2}, {"norm_placement": "post", "attention_bias": True, "mlp_bias": True}),
    "tp tied layernorm": (
        {"tp_size": 2},
        {"norm_type": "layernorm", "qk_norm": "head", "tie_word_embeddings": True, "output_norm_learnable": False},
    ),
    "tp full qk_norm": ({"tp_size": 2}, {"qk_norm": "full"}),
    "tp own": ({"tp_size": 2}, {"norm_placement": OWN, "final_norm": True}),
    "tp own, inside": ({"tp_size": 2}, {"layer_placements": ["normformer", "hybrid", OWN | INSIDE], "mlp_bias": True}),
    "tp sliding": ({"tp_size": 2}, SLIDING),
    "pp post": ({"pp_size": 2}, {"norm_placement": "post"}),
    "pp pre": ({"pp_size": 2}, {"norm_placement": "pre"}),
    "pp peri": ({"pp_size": 2}, {"norm_placement": "peri"}),
    "pp own": (
        {"pp_size": 2},
        {"norm_placement": OWN | INSIDE | {"final_norm": True, "embedding_norm": {"kind": "l2"}}},
    ),
    "pp sliding": ({"pp_size": 2}, SLIDING | {"tie_word_embeddings": False}),
    "fsdp peri": ({"fsdp_size": 2}, {"qk_norm": "full"}),
    "fsdp post tied": ({"fsdp_size": 2}, {"norm_placement": "post", "tie_word_embeddings": True}),
    "fsdp own": ({"fsdp_size": 2}, {"norm_placement": OWN | INSIDE}),
    "fsdp by layer": (None, {"norm_type": "layernorm", "output_norm_learnable": False}),
}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def apart(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value where that is above 1."""
    return ((full(tensor) - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def spread(folder: Path, parallel: dict | None) -> PeriLlamaForCausalLM:
    """The checkpoint over two ranks: by the model's plans, or (None) each layer on its own with FSDP2."""
    if parallel is not None:
        return PeriLlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**parallel))
    model = PeriLlamaForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def compare(folder: Path, name: str) -> dict:
    parallel, changes = CASES[name]
    alone = shaken_model(**changes)
    if dist.get_rank() == 0:
        alone.save_pretrained(folder / name)
    dist.barrier()
    model = spread(folder / name, parallel).eval()
    report = {"sharded": sum(isinstance(p, DTensor) for p in model.parameters())}
    ids = random_ids(2, 8)
    with torch.no_grad():
        report["logits"] = apart(model(ids).logits, alone(ids).logits)
    more = {"max_new_tokens": 4, "do_sample": False}
    if not name.startswith("fsdp"):
        report["tokens"] = torch.equal(model.generate(ids, **more), alone.generate(ids, **more))
    if name.startswith("pp"):  # its forward returns no loss: for inference only
        return report

    mine = ids.chunk(2)[dist.get_rank()] if name.startswith("fsdp") else ids
    model(mine, labels=mine, use_cache=False).loss.backward()
    alone(ids, labels=ids, use_cache=False).loss.backward()
    expected = {key: p.grad for key, p in alone.named_parameters()}
    report["gradients"] = max(apart(p.grad, expected[k]) for k, p in model.named_parameters())
    report["all"] = {key for key, _ in model.named_parameters()} == expected.keys()
    report["size"] = min(gradient.abs().max().item() for gradient in expected.values())
    return report


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    reports = {}
    for name in CASES:
        try:
            mine = compare(folder, name)
        except (RuntimeError, ValueError) as error:
            mine = {"error": f"{type(error).__name__}: {error}"}
        both: list[dict] = [{}, {}]
        dist.all_gather_object(both, mine)
        reports[name] = both
    if dist.get_rank() == 0:
        (folder / "report.json").write_text(json.dumps(reports, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
