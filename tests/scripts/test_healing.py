"""Healing a retrofit by continued pretraining: some modules alone, another model's predictions, killed and resumed."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from test_init_from import FP32, save_llama
from tiny import timeless, train, write_recipe
from transformers import AutoModelForCausalLM

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.convert import from_native
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import weights_hash
from periln.scripts import pretrain
from periln.scripts.arguments.retrofit import parse
from periln.scripts.pretrain import load_recipe
from periln.scripts.retrofit import command
from periln.scripts.training.distill import _Divergence
from periln.scripts.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]


@pytest.fixture(scope="module")
def models(tmp_path_factory, data):
    """A Llama, and what a retrofit made of it with two healing recipes."""
    folder = tmp_path_factory.mktemp("healing")
    llama = save_llama(folder / "llama", data, initializer_range=0.3)
    words = [llama, folder / "peri", "--to", "peri", "--data", data / "heldout.jsonl", "--samples", 4]
    words += ["--check-samples", 2, "--tokens", 32, "--rules", "unit", "--heal", data, "--heal-tokens", 8 * 128 * 10]
    command.main(parse([str(word) for word in words]))
    return llama, folder / "peri"


def fields(models, **more):
    llama, peri = models
    return {"init_from": str(peri), "distill_from": str(llama), "model": {}, "precision": FP32,
            "optimizer": {"warmup": 0.0}, **more}  # fmt: skip


def test_the_recipes_are_read_and_share_the_tokens(tmp_path, models, data):
    gains, whole = (yaml.safe_load((models[1] / "heal" / f"{n}.yaml").read_text()) for n in ("1-gains", "2-all"))
    assert gains["init_from"] == str(models[1])
    assert set(gains["train_only"]) == {"embed_norm", "attn_output_norm", "mlp_output_norm"}
    assert whole["init_from"] == "runs/peri-gains"
    assert "train_only" not in whole
    assert (gains["steps"], whole["steps"]) == (1, 9)
    recipe, _ = load_recipe(models[1] / "heal" / "1-gains.yaml", runs=tmp_path)
    assert recipe.distill_sha256 == weights_hash(models[0])
    assert recipe.model["norm_placement"] == "peri"


def test_only_the_modules_that_are_named_are_trained(tmp_path, data, models):
    names = ["attn_output_norm", "mlp_output_norm", "embed_norm"]
    run = train(tmp_path, data, steps=4, keep_initial=True, **fields(models, train_only=names))
    before, after = (PeriLlamaForCausalLM.from_pretrained(run.checkpoint_path(step)).state_dict() for step in (0, 4))
    moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-2] for name in moved} == set(names)
    assert len(moved) == 2 * 3 + 1


def test_the_distillation_is_the_divergence_from_the_source_and_falls(tmp_path, data, models):
    run = train(tmp_path, data, steps=12, **fields(models))
    records = run.metrics()
    recipe, tokens = load_recipe(tmp_path / "run.yaml", runs=tmp_path / "runs")
    trainer = Trainer(recipe, run, tokens)
    inputs, targets = map(torch.from_numpy, trainer.order.batch(0))
    with torch.no_grad():
        p = from_native(AutoModelForCausalLM.from_pretrained(models[0]))(inputs).logits.double().log_softmax(-1)
        q = AutoModelForCausalLM.from_pretrained(models[1])(inputs).logits.double().log_softmax(-1)
    assert records[0]["distillation"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    entropy = torch.nn.functional.nll_loss(q.flatten(0, 1), targets.flatten()).item()
    assert records[0]["loss"] == pytest.approx(entropy, rel=1e-5)
    assert records[-1]["distillation"] < 0.8 * records[0]["distillation"]


def test_a_source_beyond_fp16_teaches_a_model_in_fp16(tmp_path, data, models):
    """Its stream is infinite in FP16; what it teaches is what it says in FP32."""
    source = AutoModelForCausalLM.from_pretrained(models[0])
    for layer in source.model.layers:
        layer.mlp.down_proj.weight.data *= 1e5
    source.save_pretrained(tmp_path / "source")
    shutil.copy(models[0] / "tokenizer.json", tmp_path / "source")
    asked = fields(models, distill_from=str(tmp_path / "source"), precision={})
    run = train(tmp_path, data, steps=2, **asked)
    recipe, tokens = load_recipe(tmp_path / "run.yaml", runs=tmp_path / "runs")
    inputs = torch.from_numpy(Trainer(recipe, run, tokens).order.batch(0)[0])
    with torch.no_grad():
        p = source(inputs).logits.double().log_softmax(-1)
        q = AutoModelForCausalLM.from_pretrained(models[1])(inputs).logits.double().log_softmax(-1)
        stream = source.model(inputs, output_hidden_states=True).hidden_states[-2]
    assert stream.abs().max() > 65504
    first = run.metrics()[0]
    assert not first["found_inf"]
    assert first["distillation"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_the_gradient_is_that_of_the_divergence(tmp_path, data, models):
    """Two micro batches a step are the same step as one: each counts by its tokens."""
    runs = [train(tmp_path, data, name=f"m{m}", steps=3, micro_batch_size=m, **fields(models)) for m in (4, 2)]
    one, other = (run.metrics() for run in runs)
    for a, b in zip(one, other, strict=True):
        assert a["distillation"] == pytest.approx(b["distillation"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 1.0), ("float16", 2.0**14), ("bfloat16", 1.0)])
def test_the_divergence_and_its_gradient_are_torchs_own(dtype, scale):
    kind = getattr(torch, dtype)
    logits = (3 * torch.randn(2, 5, 300)).to(kind)
    wanted, targets = 3 * torch.randn(2, 5, 300), torch.randint(0, 300, (2, 5))
    mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
    student = theirs.float().log_softmax(-1)
    expected = F.kl_div(student, wanted.log_softmax(-1), reduction="sum", log_target=True)
    (scale * expected / 10).backward()
    with torch.autocast("cpu", kind, enabled=dtype != "float32"):  # as in a step: products would be in half precision
        divergence, entropy = _Divergence.apply(mine, wanted.clone(), targets)
    (scale * divergence / 10).backward(retain_graph=True)
    torch.testing.assert_close(divergence, expected)
    torch.testing.assert_close(entropy, F.nll_loss(student.detach().flatten(0, 1), targets.flatten(), reduction="sum"))
    assert mine.grad.dtype == kind
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert mine.grad.abs().min() > 0
    with pytest.raises(RuntimeError, match="has been used already"):
        divergence.backward()


@pytest.mark.parametrize("precision", [FP32, {}])
@pytest.mark.parametrize("names", [None, ["attn_output_norm", "embed_norm"]])
def test_a_killed_and_resumed_healing_is_the_one_that_was_not(tmp_path, data, models, precision, names):
    asked = fields(models, precision=precision, train_only=names)
    whole = train(tmp_path, data, name="whole", **asked)
    killed = train(tmp_path, data, name="killed", **asked)
    for step in (9, 12):
        shutil.rmtree(killed.checkpoint_path(step))
    shutil.copytree(whole.checkpoint_path(9), killed.checkpoint_path(9))
    killed.set_status("running", step=10)
    again = train(tmp_path, data, name="killed", **asked)
    assert timeless(again.path) == timeless(whole.path)
    assert weights_hash(again.checkpoints()[-1]) == weights_hash(whole.checkpoints()[-1])
    assert again.metrics()[-1]["distillation"] > 0


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"train_only": ["attn_outputnorm"]}, UsageError, "did you mean 'attn_output_norm'"),
        ({"train_only": []}, UsageError, "train_only names no module"),
        ({"distill_from": "nowhere/at/all"}, UsageError, "distill_from: "),
        ({"distill_sha256": "0" * 64}, UserError, "are not those of distill_sha256"),
        ({"distill_from": None, "distill_sha256": "0" * 64}, UsageError, "there is no distill_from"),
        ({"optimizer": {"z_loss": 1e-4}}, UsageError, "with distill_from the loss has no z term"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, data, models, more, error, message):
    file = write_recipe(tmp_path, data, name="refused", **fields(models) | more)
    with pytest.raises(error, match=message) as caught:
        load_recipe(file, runs=tmp_path / "runs")
    assert "\n" not in str(caught.value)


def test_a_teacher_that_has_changed_is_another_run(tmp_path, data, models):
    teacher = Path(shutil.copytree(models[0], tmp_path / "teacher"))
    asked = fields(models, distill_from=str(teacher))
    run = train(tmp_path, data, **asked)
    shutil.rmtree(run.checkpoint_path(12))
    run.set_status("running", step=9)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    torch.nn.init.ones_(model.model.norm.weight)
    model.save_pretrained(teacher)
    args = pretrain.parse(["--config", str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")])
    with pytest.raises(UserError, match="belongs to another recipe .*distill_sha256: "):
        pretrain.main(args)


def test_another_vocabulary_is_refused(tmp_path, data, models):
    other = save_llama(tmp_path / "other", data, vocab_size=321)
    with pytest.raises(AssertionError):  # the command returned 2
        train(tmp_path, data, **fields(models, distill_from=str(other)))
