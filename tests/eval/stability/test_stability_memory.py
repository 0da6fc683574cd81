"""The memory that is announced, of models of a billion parameters by their sizes alone; and what is given back."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from periln.eval.stability.plan import GIB, Options, Plan, memory
from periln.eval.texts.samples import random_samples

ROOT = Path(__file__).parents[3]

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


def anatomy_of(config):
    """Enough of an anatomy for `memory`, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return SimpleNamespace(
        model=model,
        embedding=model.get_input_embeddings(),
        lm_head=model.lm_head,
        layers=tuple(model.model.layers.named_children()),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
    )


@pytest.mark.parametrize("config", [GEMMA_3_1B, LLAMA_32_1B], ids=["gemma-3-1b", "llama-3.2-1b"])
@pytest.mark.parametrize(("options", "above"), [(QUICK, 0.0), (Options(certificate=True), 0.05)], ids=["quick", "full"])
def test_a_billion_parameters_are_announced_with_little_beside_weights_and_one_gradient(config, options, above):
    """At most 1.5 GiB beside the FP32 weights and the gradient of the largest parameter; of all samples 0.05 more."""
    anatomy = anatomy_of(config)
    sizes = [4 * p.numel() for p in anatomy.model.parameters()]
    parts = Plan.of(options, random_samples(1000, 32, 256, 0), lambda plan: None).parts
    needed = memory(anatomy, 256, parts, by_layer=True, in_place=True, options=options)
    assert {part.does for part in parts} >= {"forward", "certify", "backward", "skips", "in_fp16"}
    assert sum(sizes) < needed <= sum(sizes) + max(sizes) + (1.5 + above) * GIB


def test_other_ways_to_take_gradients_are_announced_with_more():
    """Logits that are kept beside their gradient; a second gradient of the head; all gradients at once."""
    anatomy, options = anatomy_of(GEMMA_3_1B), Options()
    plan = Plan.of(options, random_samples(1000, 32, 256, 0), lambda plan: None)
    parts = [part for part in plan.parts if part.does == "backward"]

    def needed(by_layer, ends, options=options):
        return memory(anatomy, 256, parts, by_layer, in_place=True, options=options, ends=ends)

    logits, head = 4 * 256 * 262144, 4 * 262144 * 1152
    assert needed(True, (False, True)) - needed(True, (True, True)) == 4 * logits
    assert needed(True, (False, False)) - needed(True, (False, True)) == head
    one = Options(backward_samples=1)
    assert needed(True, (False, False), one) == needed(True, (False, True), one)  # a second batch makes the second one
    everything = sum(4 * p.numel() for p in anatomy.model.parameters())
    assert needed(False, (True, True)) > needed(True, (True, True)) - head + everything


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc"
)
def test_what_the_allocator_keeps_is_returned():
    """In a process of its own: 200 MiB in pieces that lie below one that stays are freed, and only then returned."""
    program = """
import re
from periln.runkit.process import return_freed_memory

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

pieces = [bytes(50_000 + i % 7) for i in range(4200)]
last = bytes(50_000)
del pieces
kept = resident()
return_freed_memory()
print(kept, resident(), len(last))
"""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES", "PYTHON"))
    }
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    before, after, _ = map(int, done.stdout.split())
    assert before - after > 150, done.stdout
