"""Fine-tuning plain Llamas with the chat templates that their tokenizers carry: what is saved, stops and resumes."""

import json
import os
import shutil
import signal

import pytest
import torch
from chatting import ENDS, family, tiny_llama
from datasets import Dataset
from small import timeless, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from periln.model_cards.cards import render_card
from periln.model_cards.subject import find_subject
from periln.runkit.errors import run_command
from periln.runkit.folder import RunFolder, read_json, weights_hash
from periln.runkit.process import StopRequest
from periln.sft import train, trainer
from periln.sft.conversations import load_conversations
from periln.sft.recipe import Recipe
from periln.sft.tokens import IGNORED, tokenize, turn_end

pytestmark = pytest.mark.usefixtures("own_process")
PLAIN = {"precision": "fp32", "residual_dtype": None}


def tune(model, recipe, *more: str) -> int:
    return run_command(train.main, train.parse(["--config", str(recipe), "--model", str(model), *more]))


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def tuned(request, tmp_path_factory):
    """A published Llama, and its fine-tuning, all weights."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_llama(folder / "model", family(request.param))
    assert tune(model, write_recipe(folder, epochs=2)) == 0  # in FP16, as the default recipe
    return request.param, model, RunFolder(folder / "model-sft")


@pytest.mark.slow
def test_the_checkpoint_keeps_its_template_and_stops_at_its_end(tuned):
    name, model, run = tuned
    (last,) = run.checkpoints()[-1:]
    tokenizer = AutoTokenizer.from_pretrained(last)
    assert (last / "chat_template.jinja").read_bytes() == (model / "chat_template.jinja").read_bytes()
    assert (last / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    saved = read_json(last / "generation_config.json")["eos_token_id"]
    ends = {*(saved if isinstance(saved, list) else [saved])}
    assert ends == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(ENDS[name])}
    assert "residual_dtype" not in read_json(last / "config.json")
    losses = [record["loss"] for record in run.metrics()]
    assert run.status == "completed" and len(losses) == 8 and losses[-1] < losses[0]


@pytest.mark.slow
def test_the_records_and_the_card_say_which_template_it_was(tuned):
    name, _, run = tuned
    for record in (run.summary, read_json(run.path / "data.json")):
        assert record["chat_template"]["answer_ends_with"] == ENDS[name]
        assert record["chat_template"]["generation_marks"] is False
    assert run.recipe["residual_dtype"] is None
    card = render_card(find_subject(run.path))
    end = ENDS[name].replace("|", "\\|")
    assert f"| chat template | the model's own; an answer ends with `{end}` |" in card


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_nothing_had_happened(tuned, tmp_path, monkeypatch):
    _, model, run = tuned
    again = shutil.copytree(model, tmp_path / "model")
    recipe = write_recipe(tmp_path, epochs=2, data=run.recipe["data"])
    at, plain = {2: signal.SIGTERM}, trainer.Recorder.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in at:
            os.kill(os.getpid(), at.pop(state.global_step))
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.Recorder, "on_step_begin", on_step_begin)
    assert tune(again, recipe) == 143
    stopped = RunFolder(tmp_path / "model-sft")
    assert (stopped.status, stopped.summary["step"]) == ("interrupted", 3)
    assert tune(again, recipe) == 0
    assert timeless(stopped) == timeless(run)
    assert weights_hash(stopped.checkpoints()[-1]) == weights_hash(run.checkpoints()[-1])


@pytest.mark.slow
def test_another_template_since_is_refused(tuned, tmp_path, capsys):
    _, model, run = tuned
    again = shutil.copytree(model, tmp_path / "model")
    shutil.copytree(run.path, tmp_path / "model-sft")
    file = again / "chat_template.jinja"
    file.write_text(file.read_text() + "{# changed #}")
    assert tune(again, write_recipe(tmp_path, epochs=2, data=run.recipe["data"])) == 1
    assert "model-sft was begun with another chat template than" in capsys.readouterr().err


@pytest.mark.slow
def test_answers_end_by_themselves_after_all_weights_and_after_lora(tmp_path, capsys):
    """The base's own generation stops at the end of a text alone: the turn's end is learned, saved and stopped at."""
    model = tiny_llama(tmp_path / "model", family("llama3"))
    rows = [{"conversations": ["hi", "yes"]}, {"conversations": ["ho", "no, <|eot_id|>"]}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"epochs": 60, "batch_size": 2, "learning_rate": 1e-2, "save_strategy": "end"} | PLAIN
    assert tune(model, write_recipe(tmp_path, **fields)) == 0
    capsys.readouterr()
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = write_recipe(tmp_path, **fields, peft={"r": 16, "dropout": 0.0, "target_modules": linear})
    assert tune(model, lora, "--peft", "--merge") == 0
    assert "does not end an answer with the turn" in capsys.readouterr().out
    whole = RunFolder(tmp_path / "model-sft").checkpoints()[-1]
    (merged,) = (tmp_path / "model-sft-lora" / "merged").iterdir()
    for folder in (whole, merged):
        found, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        assert found.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt"
        )
        out = found.generate(**asked, max_new_tokens=40, do_sample=False)[0, asked["input_ids"].shape[1] :].tolist()
        assert out[-1] == end and (folder == merged or tokenizer.decode(out[:-1]) == "yes")


def batches(tmp_path, packing: bool):
    """TRL's batch of three conversations, and the ids and labels that they were read as."""
    tokenizer = family("chatml")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "model", tokenizer))
    rows = [["a", "b"], ["how long is it?", "seven <|im_end|> minutes"], ["c", "a longer answer than the others"]]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    tokens = tokenize(load_conversations(str(tmp_path / "talk.jsonl")), tokenizer, 200)
    recipe = Recipe(data="talk.jsonl", batch_size=3, max_length=200, packing=packing, **PLAIN)
    made = trainer.ExactTrainer(
        RunFolder(tmp_path / "run"),
        recipe,
        trainer.Recorder(RunFolder(tmp_path / "run"), model, None),
        StopRequest(),
        model=model,
        args=trainer.arguments(recipe, str(tmp_path / "scratch"), labelled=True),
        train_dataset=Dataset.from_dict({"input_ids": tokens.ids, "labels": tokens.labels}),
        processing_class=tokenizer,
    )
    return tokenizer, tokens, made.data_collator([made.train_dataset[i] for i in range(len(made.train_dataset))])


def test_padding_is_never_trained_on_although_it_is_the_token_that_ends_a_turn(tmp_path):
    tokenizer, tokens, batch = batches(tmp_path, packing=False)
    end, longest = turn_end(tokenizer), max(map(len, tokens.ids))
    assert tokenizer.pad_token_id == end
    for ids, labels, row in zip(tokens.ids, tokens.labels, range(3), strict=True):
        rest = longest - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [end] * rest
        assert batch["labels"][row].tolist() == labels + [IGNORED] * rest
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * rest
    assert (batch["labels"] == end).sum(-1).tolist() == [1, 1, 1]


def test_packed_rows_are_trained_on_the_same_tokens(tmp_path):
    tokenizer, tokens, batch = batches(tmp_path, packing=True)
    expected = sorted(label for row in tokens.labels for label in row if label != IGNORED)
    assert sorted(batch["labels"][batch["labels"] != IGNORED].tolist()) == expected
    assert (batch["labels"] == turn_end(tokenizer)).sum() == 3
    assert torch.equal(batch["input_ids"][batch["labels"] != IGNORED], batch["labels"][batch["labels"] != IGNORED])


def test_the_streams_dtype_is_for_models_that_have_one(tmp_path, capsys):
    model = tiny_llama(tmp_path / "model", family("chatml"))
    assert tune(model, write_recipe(tmp_path), "--show-labels", "1") == 0
    assert (
        "a llama has the stream of its own code, so residual_dtype is null and not float16" in capsys.readouterr().err
    )
    assert tune(model, write_recipe(tmp_path, residual_dtype="bfloat16"), "--show-labels", "1") == 2
    assert "residual_dtype bfloat16: a llama (" in capsys.readouterr().err


def test_labels_of_a_template_that_is_refused_are_not_shown_and_nothing_is_written(tmp_path, capsys):
    model = tiny_llama(tmp_path / "model", family("gemma"))
    rows = [{"messages": [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tune(model, write_recipe(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "talk.jsonl, row 1: the chat template of" in error and "(System role not supported): change the" in error
    assert not (tmp_path / "model-sft").exists()
