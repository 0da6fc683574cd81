"""What a measurement says that it needs: of models of a billion parameters, computed from their sizes alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from periln.eval.stability.plan import GIB, Options, Plan, memory
from periln.eval.texts.samples import random_samples

GEMMA_3_1B = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=1152,
    intermediate_size=6912,
    num_hidden_layers=26,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
)
LLAMA_32_1B = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
QUICK = Options(backward_samples=1, skip_samples=1, fp16_samples=1, certificate=True)


@pytest.mark.parametrize("config", [GEMMA_3_1B, LLAMA_32_1B], ids=["gemma-3-1b", "llama-3.2-1b"])
@pytest.mark.parametrize(("options", "above"), [(QUICK, 0.0), (Options(certificate=True), 0.05)], ids=["quick", "full"])
def test_a_billion_parameters_are_announced_with_little_beside_weights_and_one_gradient(config, options, above):
    """At most 1.5 GiB beside the FP32 weights and the gradient of the largest parameter; of all samples 0.05 more."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    anatomy = SimpleNamespace(
        model=model,
        lm_head=model.lm_head,
        layers=tuple(model.model.layers.named_children()),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
    )
    sizes = [4 * p.numel() for p in model.parameters()]
    parts = Plan.of(options, random_samples(1000, 32, 256, 0), lambda plan: None).parts
    needed = memory(anatomy, 256, parts, staged=True, in_place=True, options=options)
    assert {part.does for part in parts} >= {"forward", "certify", "backward", "skips", "in_fp16"}
    assert sum(sizes) < needed <= sum(sizes) + max(sizes) + (1.5 + above) * GIB
