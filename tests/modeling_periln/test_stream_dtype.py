"""The residual stream's dtype is what the config says, at every add; norm statistics are FP32 whatever it is."""

import pytest
import torch
from tiny_models import random_ids, shaken_model, tiny_config, tiny_model

from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.modeling_periln import PeriLlamaResidual
from modeling_periln.norms import NORMS

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtypes_at_the_adds(model) -> list[tuple[torch.dtype, torch.dtype]]:
    """A list that fills, as the model runs, with the dtypes of (stream before, stream after) at each residual add."""
    seen = []
    for module in model.modules():
        if isinstance(module, PeriLlamaResidual):
            module.register_forward_hook(lambda m, args, out: seen.append((args[0].dtype, out.dtype)))
    return seen


def dtypes_into_products(model) -> set[torch.dtype]:
    """A set that fills with the dtypes that q_proj and gate_proj are given."""
    seen = set()
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            linear.register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    return seen


@pytest.mark.parametrize("placement", ["post", "pre", "peri", "output", "deepnorm"])
@pytest.mark.parametrize("autocast", ["float16", "bfloat16"])
@pytest.mark.parametrize("residual", ["float16", "bfloat16", "float32"])
def test_under_autocast_every_add_has_the_streams_dtype(placement, autocast, residual):
    model = shaken_model(norm_placement=placement, residual_dtype=residual)
    adds = dtypes_at_the_adds(model)
    with torch.autocast("cpu", dtype=DTYPES[autocast]):
        output = model(random_ids(), labels=random_ids())
    assert adds == [(DTYPES[residual], DTYPES[residual])] * 6
    assert output.logits.dtype == DTYPES[autocast]
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("autocast", ["float16", "bfloat16"])
def test_without_a_residual_dtype_the_stream_under_autocast_is_fp32(autocast):
    """The trap: training "in FP16" under autocast says nothing of an FP16 stream unless residual_dtype is set."""
    model = shaken_model()
    adds = dtypes_at_the_adds(model)
    with torch.autocast("cpu", dtype=DTYPES[autocast]):
        model(random_ids())
    assert adds == [(torch.float32, torch.float32)] * 6


@pytest.mark.parametrize("placement", ["post", "pre", "peri", "output"])
@pytest.mark.parametrize("residual", ["float32", "float16", None])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_bf16_model_without_autocast_keeps_its_products_in_bf16(placement, residual, attention):
    model = shaken_model(norm_placement=placement, residual_dtype=residual, attn_implementation=attention)
    model = model.to(torch.bfloat16)
    adds, products = dtypes_at_the_adds(model), dtypes_into_products(model)
    output = model(random_ids(), output_hidden_states=True)
    stream = DTYPES[residual or "bfloat16"]
    assert adds == [(stream, stream)] * 6
    assert products == {torch.bfloat16}
    assert output.logits.dtype == torch.bfloat16
    assert [h.dtype for h in output.hidden_states] == [stream] * 3 + [torch.bfloat16]


def test_an_fp32_stream_makes_a_bf16_model_more_exact(tmp_path):
    tiny_model(norm_placement="pre", num_hidden_layers=16).save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    errors = {}
    for residual in ("float32", None):
        load = {"dtype": torch.bfloat16, "residual_dtype": residual}
        model = PeriLlamaForCausalLM.from_pretrained(tmp_path, **load)
        exact = PeriLlamaForCausalLM.from_pretrained(tmp_path, **load).float()
        errors[residual] = (model.model(ids)[0] - exact.model(ids)[0]).square().mean().item()
    assert errors["float32"] < 0.3 * errors[None]


def test_the_stream_overflows_in_fp16_where_it_does_not_in_bf16():
    """Each add of Peri-LN can move the stream by sqrt(D) * gamma: gammas of 10,000 pass 65,504 in a few layers."""
    finite = {}
    for residual in ("float16", "bfloat16"):
        model = tiny_model(residual_dtype=residual)
        for layer in model.model.layers:
            layer.mlp_output_norm.weight.data.fill_(60_000.0)
        states = model(random_ids(), output_hidden_states=True).hidden_states
        finite[residual] = bool(states[1].isfinite().all())
    assert finite == {"float16": False, "bfloat16": True}


def test_gradient_checkpointing_recomputes_in_the_same_dtypes():
    model = shaken_model(residual_dtype="float32").to(torch.bfloat16).train()
    adds = dtypes_at_the_adds(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(random_ids(), labels=random_ids(), use_cache=False).loss.backward()
    assert len(adds) > 6  # the forward pass, and recomputation up to the last value that backward needs
    assert set(adds) == {(torch.float32, torch.float32)}


def test_generation_with_a_cache_works_with_any_stream():
    model = shaken_model(residual_dtype="float32").to(torch.bfloat16)
    ids = random_ids(2, 5)
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokens.shape == (2, 11)
    assert torch.equal(tokens, model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False))


def test_a_saved_config_has_no_residual_dtype_unless_it_was_asked_for(tmp_path):
    assert tiny_config().residual_dtype is None
    tiny_model().save_pretrained(tmp_path / "plain")
    assert PeriLlamaConfig.from_pretrained(tmp_path / "plain").residual_dtype is None
    tiny_model(residual_dtype="float32").save_pretrained(tmp_path / "asked")
    assert PeriLlamaConfig.from_pretrained(tmp_path / "asked").residual_dtype == "float32"
    loaded = PeriLlamaForCausalLM.from_pretrained(tmp_path / "plain", residual_dtype="bfloat16")
    adds = dtypes_at_the_adds(loaded)
    loaded(random_ids())
    assert adds == [(torch.bfloat16, torch.bfloat16)] * 6


# The norms themselves


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("peak", [1.0, 256.0, 60_000.0])
def test_norm_of_an_fp16_row_is_exact_up_to_its_last_rounding(norm_type, peak):
    """In FP16 a square overflows at |x| = 256; statistics in FP32 do not."""
    norm = NORMS[norm_type](64, eps=1e-6)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    x = (x / x.abs().max() * peak).half()
    wide = x.double() - (x.double().mean(-1, keepdim=True) if norm_type == "layernorm" else 0)
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    y = norm(x)
    assert y.dtype == torch.float16
    assert y.isfinite().all()
    assert ((y.double() - expected).abs() <= 2**-11 * expected.abs() + 1e-6).all()
    if peak > 1000:
        assert x.square().mean(-1).isinf().any()  # what the norm would have had to divide by


@pytest.mark.parametrize("norm_type", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("gamma_dtype", [torch.float32, torch.float16])
def test_gradient_of_a_norm_of_large_fp16_values_is_that_of_fp64(norm_type, gamma_dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, 64, generator=generator).clamp(-4, 4) * 15_000).half().requires_grad_()
    gradient = (torch.randn(8, 64, generator=generator) * 1000).half()
    norm, exact = NORMS[norm_type](64).to(gamma_dtype), NORMS[norm_type](64).double()
    wide = x.detach().double().requires_grad_()
    norm(x).backward(gradient)
    exact(wide).backward(gradient.double())
    assert torch.allclose(x.grad.double(), wide.grad, rtol=2e-3, atol=1e-4)
    assert torch.allclose(norm.weight.grad.double(), exact.weight.grad, rtol=2e-3, atol=2.0)
    assert wide.grad.abs().mean() > 0.01


def test_gamma_is_applied_before_the_result_is_rounded():
    """Rounded first, as Llama's norm does, 1/3-like values times gamma would carry two roundings."""
    norm = NORMS["rmsnorm"](64)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).half()
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), (norm.weight * wide).half())
    assert not torch.equal(norm(x), norm.weight.half() * wide.half())


def test_shapes_can_be_had_on_the_meta_device_with_any_stream():
    with torch.device("meta"):
        model = PeriLlamaForCausalLM(tiny_config(residual_dtype="float16"))
    assert model(random_ids().to("meta")).logits.shape == (2, 7, 61)
