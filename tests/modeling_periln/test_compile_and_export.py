"""torch.compile and torch.export: one graph, one compilation where one is enough, and the same numbers.

The backend is `aot_eager` (traces forward and backward, runs the operators as they are) or a counting one; a single
test asks inductor for code.
"""

import shutil
import warnings

import pytest
import torch
from tiny_models import random_ids, shaken_model
from torch._dynamo.backends.registry import lookup_backend
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

from modeling_periln.arguments import CACHE

pytestmark = pytest.mark.slow

VARIANTS = {
    "post": {"norm_placement": "post"},
    "peri": {"norm_placement": "peri"},
    "lns": {"norm_placement": "lns"},
    "peri, layernorm, qk_norm": {"norm_placement": "peri", "norm_type": "layernorm", "qk_norm": "head"},
}


def shallow(name: str, **changes):
    """Two layers: enough for factors that differ by layer."""
    return shaken_model(num_hidden_layers=2, **VARIANTS[name], **changes)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="While compiling, we found certain side effects")
        yield
    torch._dynamo.reset()


def recording(backend: str = "eager"):
    """A backend that runs graphs as `backend` does, and the list of the graphs it was given."""
    graphs, run = [], lookup_backend(backend)

    def compile_graph(graph, example_inputs):
        graphs.append(graph)
        return run(graph, example_inputs)

    return compile_graph, graphs


# torch.compile


def training_step(model, call, **inputs):
    """Loss, logits and gradients."""
    model.zero_grad()
    output = call(**inputs, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), {k: p.grad.clone() for k, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, True) for name in VARIANTS), ("peri", False)])
def test_a_training_step_on_a_padded_batch_is_one_graph_with_the_same_gradients(name, checkpointing):
    model, ids = shallow(name).train(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    loss, logits, gradients = training_step(model, model, **inputs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backend, graphs = recording("aot_eager")
    compiled = training_step(model, torch.compile(model, fullgraph=True, backend=backend), **inputs)
    assert torch.allclose(compiled[0], loss, atol=1e-6)
    assert torch.allclose(compiled[1][mask.bool()], logits[mask.bool()], atol=1e-6)
    for key, gradient in gradients.items():
        assert torch.allclose(compiled[2][key], gradient, atol=1e-5), key
    (graph,) = graphs
    checkpointed = [node for node in graph.graph.nodes if "checkpoint" in str(node.target)]
    assert len(checkpointed) == (2 if checkpointing else 0)  # one a layer


def test_one_compilation_serves_every_length():
    model, (backend, graphs) = shallow("peri"), recording()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (5, 9, 17):
        ids = random_ids(2, length, seed=length)
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-6)
    assert len(graphs) == 1


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++ for a CPU")
def test_inductor_computes_the_same_logits():
    model, ids = shaken_model(num_hidden_layers=1, qk_norm="head"), random_ids(2, 9)
    logits = torch.compile(model, fullgraph=True)(ids, use_cache=False).logits
    assert torch.allclose(logits, model(ids).logits, atol=1e-5)


# Decoding with a static cache


@torch.no_grad()
@pytest.mark.parametrize("name", ["post", "peri, layernorm, qk_norm"])
def test_decoding_compiles_once_for_the_prompt_and_once_for_all_later_tokens(name):
    model, ids, (backend, graphs) = shallow(name), random_ids(2, 5), recording()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    cache = StaticCache(config=model.config, max_cache_len=32)
    step, tokens, compilations = ids, [], []
    for _ in range(8):
        logits = compiled(step, **{CACHE: cache}, use_cache=True).logits
        step = logits[:, -1:].argmax(-1)
        tokens.append(step)
        compilations.append(len(graphs))
    assert compilations == [1, *[2] * 7]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.cat([ids, *tokens], dim=1), expected)


def test_generate_with_a_static_cache_compiles_its_decoding_step_once():
    model, ids, (backend, graphs) = shallow("peri"), random_ids(2, 5), recording()
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    how = CompileConfig(fullgraph=True, mode=None, backend=backend)
    how._compile_all_devices = True  # else only on a GPU
    more = {"max_new_tokens": 10, "do_sample": False, "cache_implementation": "static", "compile_config": how}
    assert torch.equal(model.generate(ids, **more), expected)
    assert len(graphs) == 1


# torch.export


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in VARIANTS), ("peri, layernorm, qk_norm", True)]
)
def test_an_exported_program_takes_any_length(name, strict):
    model = shallow(name, use_cache=False)
    length = torch.export.Dim("length", min=2, max=60)
    program = torch.export.export(model, (random_ids(2, 9),), dynamic_shapes=({1: length},), strict=strict).module()
    for size in (2, 9, 30):
        ids = random_ids(2, size, seed=size)
        assert torch.allclose(program(ids).logits, model(ids).logits, atol=1e-6)


def test_the_executorch_recipe_decodes_token_by_token():
    model, ids = shallow("peri"), random_ids(1, 6)
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static")
    recipe = TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16, device=torch.device("cpu"))
    program = recipe.export(input_ids=ids[:, :1]).module()
    steps = [program(input_ids=ids[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(6)]
    assert torch.allclose(torch.cat(steps, dim=1), model(ids).logits, atol=1e-5)
