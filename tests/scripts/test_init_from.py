"""Continued pretraining: a run that begins with another model's weights, is killed, and resumes bit for bit."""

import json
import shutil

import pytest
import torch
import yaml
from tiny import MODEL, make_data, timeless, train, write_recipe
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from modeling_periln import PeriLlamaForCausalLM
from modeling_periln.convert import from_native
from periln.runkit.errors import UsageError, UserError
from periln.runkit.folder import RunFolder, weights_hash
from periln.scripts import pretrain
from periln.scripts.plan.command import load as load_plan
from periln.scripts.pretrain import load_recipe
from periln.scripts.sweep.cells import load_sweep
from periln.scripts.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_accelerate")]

FP32 = {"mode": "fp32", "residual_dtype": None}
SHAPE = {name: value for name, value in MODEL.items() if name != "num_hidden_layers"} | {"num_hidden_layers": 3}


def save_llama(folder, data, **fields):
    """A tiny Llama with random weights, norms' gains included, and the data's tokenizer next to it."""
    torch.manual_seed(7)
    config = LlamaConfig(**{"vocab_size": 320, "rope_theta": 1e4, "rms_norm_eps": 1e-5, **SHAPE, **fields})
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path, data):
    return save_llama(tmp_path / "llama", data)


def continued(folder, data, source, **more):
    """The fields of a recipe that begins with `source`."""
    return {"init_from": str(source), "model": {}, "precision": FP32, "optimizer": {"warmup": 0.0}, **more}


def test_the_first_loss_is_the_llamas_on_that_batch(tmp_path, data, llama):
    run = train(tmp_path, data, steps=1, keep_initial=True, **continued(tmp_path, data, llama))
    recipe, tokens = load_recipe(tmp_path / "run.yaml", runs=tmp_path / "runs")
    trainer = Trainer(recipe, run, tokens)
    inputs, targets = map(torch.from_numpy, trainer.order.batch(0))
    logits = AutoModelForCausalLM.from_pretrained(llama)(inputs).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert run.metrics()[0]["loss"] == pytest.approx(theirs, abs=2e-6)
    assert theirs < 7  # a loss that says something
    started = PeriLlamaForCausalLM.from_pretrained(run.checkpoint_path(0))
    ours = from_native(AutoModelForCausalLM.from_pretrained(llama)).state_dict()
    assert started.state_dict().keys() == ours.keys()
    for name, weight in started.state_dict().items():
        assert torch.equal(weight, ours[name]), name


def test_the_record_says_what_it_began_with(tmp_path, data, llama):
    run = train(tmp_path, data, steps=1, **continued(tmp_path, data, llama))
    record = json.loads((run.path / "environment.json").read_text())["init_from"]
    assert record["weights_sha256"] == weights_hash(llama) == run.recipe["init_sha256"]
    assert (record["model_type"], record["converted"], record["source"]) == ("llama", True, str(llama))
    model = run.recipe["model"]
    assert (model["norm_placement"], model["norm_eps"], model["vocab_size"]) == ("pre", 1e-5, 320)
    assert model["num_hidden_layers"] == 3
    assert model["rope_parameters"]["rope_theta"] == 1e4


@pytest.mark.parametrize("precision", [FP32, {}])
def test_killed_and_resumed_without_its_source_it_is_the_run_that_was_not(tmp_path, data, llama, precision):
    fields = continued(tmp_path, data, llama, precision=precision)
    whole = train(tmp_path, data, name="whole", **fields)
    killed = train(tmp_path, data, name="killed", **fields)
    for step in (9, 12):
        shutil.rmtree(killed.checkpoint_path(step))
    shutil.copytree(whole.checkpoint_path(9), killed.checkpoint_path(9))
    killed.set_status("running", step=10)
    shutil.rmtree(llama)
    again = train(tmp_path, data, name="killed", **fields)
    assert timeless(again.path) == timeless(whole.path)
    assert weights_hash(again.checkpoints()[-1]) == weights_hash(whole.checkpoints()[-1])
    assert json.loads((again.path / "environment.json").read_text())["init_from"]["model_type"] == "llama"


def test_killed_before_its_first_checkpoint_it_begins_with_the_source_again(tmp_path, data, llama):
    fields = continued(tmp_path, data, llama)
    whole = train(tmp_path, data, name="whole", **fields)
    shutil.copytree(whole.path, tmp_path / "runs" / "early")
    early = RunFolder(tmp_path / "runs" / "early")
    recipe = early.recipe | {"name": "early"}
    (early.path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    shutil.rmtree(early.checkpoints_path)
    early.truncate_metrics(2)
    early.set_status("running", step=2)
    assert timeless(train(tmp_path, data, name="early", **fields).path) == timeless(whole.path)


def test_another_source_under_the_same_name_is_another_run(tmp_path, data, llama):
    fields = continued(tmp_path, data, llama)
    run = train(tmp_path, data, **fields)
    shutil.rmtree(run.checkpoints_path)
    run.set_status("running", step=1)
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.nn.init.ones_(model.model.norm.weight)
    model.save_pretrained(llama)
    with pytest.raises(UserError, match="belongs to another recipe .*init_sha256: "):
        pretrain.main(pretrain.parse(["--config", str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")]))


def test_a_run_of_our_own_is_continued_as_it_is(tmp_path, data):
    first = train(tmp_path, data, name="first", precision=FP32, keep_last=1)
    run = train(tmp_path, data, name="second", keep_initial=True, **continued(tmp_path, data, first.path))
    assert weights_hash(run.checkpoint_path(0)) == weights_hash(first.checkpoint_path(12))
    assert run.recipe["model"]["norm_placement"] == "peri"
    record = json.loads((run.path / "environment.json").read_text())["init_from"]
    assert (record["checkpoint"], record["converted"]) == ("step_00000012", False)


def test_a_tied_model_stays_tied(tmp_path, data):
    source = save_llama(tmp_path / "tied", data, tie_word_embeddings=True)
    run = train(tmp_path, data, steps=2, **continued(tmp_path, data, source))
    model = PeriLlamaForCausalLM.from_pretrained(run.checkpoints()[-1])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_longer_context_is_the_recipes_to_say(tmp_path, data, llama):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model = {"max_position_embeddings": 256, "rope_parameters": rope}
    run = train(tmp_path, data, steps=1, sequence_length=200, **continued(tmp_path, data, llama, model=model))
    config = PeriLlamaForCausalLM.from_pretrained(run.checkpoints()[-1]).config
    assert config.max_position_embeddings == 256
    assert config.rope_parameters["factor"] == 2.0


def refused(tmp_path, data, source, error, message, **more):
    file = write_recipe(tmp_path, data, name="refused", **continued(tmp_path, data, source, **more))
    with pytest.raises(error, match=message) as caught:
        load_recipe(file, runs=tmp_path / "runs")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": {"hidden_size": 64}}, UsageError, "model.hidden_size is 32 in init_from .*llama, not 64: leave it"),
        ({"model": {"norm_placement": "peri"}}, UsageError, "model.norm_placement is 'pre' in init_from"),
        ({"model": {"rope_theta": 5e5}}, UsageError, "model.rope_theta: with init_from, say all of"),
        ({"model": {"hiden_size": 32}}, UsageError, "model: unknown field 'hiden_size'.*'hidden_size'"),
        ({"model": {"residual_dtype": "float16"}}, UsageError, "model.residual_dtype belongs to the run"),
        ({"sequence_length": 129}, UsageError, "sequence_length 129 exceeds model.max_position_embeddings 128"),
        ({"init_sha256": "0" * 64}, UserError, "are not those of init_sha256"),
        ({"init_from": "/nowhere/at/all"}, UsageError, "init_from: /nowhere/at/all does not exist"),
        ({"init_from": None}, UsageError, "the field model is missing: give the model's fields, or init_from"),
        ({"init_from": None, "init_sha256": "0" * 64}, UsageError, "init_sha256 is the hash of what init_from names"),
    ],
)
def test_what_does_not_fit_the_source_is_refused_by_name(tmp_path, data, llama, fields, error, message):
    refused(tmp_path, data, llama, error, message, **fields)


def test_a_family_that_this_one_cannot_hold_is_refused(tmp_path, data):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=320)).save_pretrained(tmp_path / "gpt2")
    refused(tmp_path, data, tmp_path / "gpt2", UsageError, "is 'gpt2', which this family cannot hold: .*llama")


def test_a_pickled_checkpoint_is_refused(tmp_path, data, llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(tmp_path, data, llama, UsageError, "init_from: .*has no weights in safetensors")


def test_weights_that_are_missing_are_refused_before_the_first_step(tmp_path, data, llama):
    config = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 4}
    (llama / "config.json").write_text(json.dumps(config))
    file = write_recipe(tmp_path, data, **continued(tmp_path, data, llama))
    with pytest.raises(UserError, match="init_from: .*llama lacks 9 of the model's weights"):
        pretrain.main(pretrain.parse(["--config", str(file), "--runs", str(tmp_path / "runs")]))
    assert not (tmp_path / "runs" / "run" / "recipe.yaml").exists()


def test_data_of_another_tokenizer_are_refused_by_the_first_token(tmp_path, data, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    file = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = file["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.get)[-1:-3:-1]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    (llama / "tokenizer.json").write_text(json.dumps(file))
    refused(tmp_path, data, llama, UserError, r"init_from: token .* is (298|299) in .*llama and (298|299) in the data")


def test_a_tokenizer_that_cuts_words_in_another_way_is_refused(tmp_path, data, llama):
    file = json.loads((llama / "tokenizer.json").read_text())
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (llama / "tokenizer.json").write_text(json.dumps(file))
    refused(tmp_path, data, llama, UserError, "the data's tokenizer has another pre_tokenizer than .*llama's")


def test_a_source_without_a_tokenizer_is_refused(tmp_path, data, llama):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).unlink()
    refused(tmp_path, data, llama, UserError, "has no tokenizer: nothing says which token each of its ids is")


def test_data_with_more_tokens_than_the_source_are_refused(tmp_path, data):
    small = save_llama(tmp_path / "small", data, vocab_size=299)
    refused(tmp_path, data, small, UsageError, "init_from: .*small has 299 tokens, and the data .* have 300")


def test_plans_and_sweeps_know_the_sources_model(tmp_path, data, llama):
    fields = continued(tmp_path, data, llama)
    file = write_recipe(tmp_path, data, **fields)
    _, config, said = load_plan(file, [], 1)
    assert (config.num_hidden_layers, config.vocab_size, said) == (3, 320, "of init_from")
    sweep = yaml.safe_load(file.read_text()) | {"name": "sweep", "grid": {"seed": [1, 2]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    found = load_sweep(tmp_path / "sweep.yaml", tmp_path / "runs")
    assert [cell.placement for cell in found.cells] == ["pre", "pre"]
    found.check_data()


def test_a_sweep_over_data_of_another_tokenizer_names_the_cell(tmp_path, llama, data):
    other = tmp_path / "other"
    other.mkdir()
    source = save_llama(tmp_path / "source", make_data(other), vocab_size=320)
    file = json.loads((source / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "Lowercase"}
    (source / "tokenizer.json").write_text(json.dumps(file))
    recipe = write_recipe(tmp_path, data, **continued(tmp_path, data, source))
    sweep = yaml.safe_load(recipe.read_text()) | {"name": "sweep", "grid": {"seed": [1]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(UserError, match="cell seed1: init_from: the data's tokenizer has another normalizer"):
        load_sweep(tmp_path / "sweep.yaml", tmp_path / "runs").check_data()
