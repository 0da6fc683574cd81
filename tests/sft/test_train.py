"""Fine-tuning: what is recorded and kept, runs that are stopped and damaged, runs that overflow, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from small import ROOT, make_run, timeless, tune, words, write_conversations, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from periln.runkit.checkpoints import damage_of
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder, weights_hash
from periln.sft import train, trainer
from periln.sft.arguments import train as arguments
from periln.sft.conversations import CHAT_TEMPLATE, END_OF_TURN
from periln.sft.recipe import Recipe
from periln.sft.tokens import tokenize

EPOCHS = ["step_00000004", "step_00000008", "step_00000012"]


@pytest.fixture(autouse=True)
def _signals():
    """A command takes over the signals of the process; give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps one precision for a process; a test may have its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A fine-tuning that was not interrupted."""
    folder = tmp_path_factory.mktemp("tuned")
    run = make_run(folder)
    assert tune(write_recipe(folder), run) == 0
    return RunFolder(run.path / "sft")


@pytest.mark.slow
def test_a_run_records_every_step_and_what_it_was_trained_on(tuned):
    assert tuned.status == "completed"
    records, summary = tuned.metrics(), tuned.summary
    assert [r["step"] for r in records] == list(range(12))
    assert records[-1]["loss"] < records[0]["loss"] - 0.3
    conversations = train.load_conversations(tuned.recipe["data"])
    counts = tokenize(conversations, AutoTokenizer.from_pretrained(tuned.checkpoints()[-1]), 64).counts()
    assert {key: summary[key] for key in counts} == counts
    assert (counts["conversations"], counts["truncated"], counts["dropped"]) == (14, 1, 0)
    data = json.loads((tuned.path / "data.json").read_text())
    assert (data["name"], data["truncated_rows"], data["dropped_rows"]) == ("talk.jsonl", [14], [])
    assert records[-1]["tokens"] == 3 * counts["all_tokens"]
    assert (summary["steps_per_epoch"], summary["step"]) == (4, 12)
    half = 0.5 * 1e-3 * (1 + math.cos(math.pi * 6 / 12))
    assert records[6]["learning_rate"] == pytest.approx(half)
    assert tuned.recipe["data_sha256"] == conversations.sha256


@pytest.mark.slow
def test_it_is_fp16_that_is_fp16(tuned):
    seen = json.loads((tuned.path / "environment.json").read_text())
    assert seen["loss_scaler"] is True
    assert {dtype for add in seen["residual_adds"].values() for dtype in add.values()} == {"float16"}
    assert seen["linear_outputs"] == {"float16": 2 * 7}  # TRL multiplies by the head's weight itself
    assert seen["parameters"] == seen["gradients"] == ["float32"]


@pytest.mark.slow
def test_every_epoch_stays_as_a_model_folder_without_a_pickle(tuned):
    assert [p.name for p in tuned.checkpoints()] == EPOCHS
    assert [(p / "trainer_state").exists() for p in tuned.checkpoints()] == [False, False, True]
    files = [p for p in tuned.path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".py", ".jinja", ".yaml", ".jsonl", ".lock"}
    assert all(damage_of(p) is None for p in tuned.checkpoints())
    assert len({weights_hash(p) for p in tuned.checkpoints()}) == 3
    tokenizer = AutoTokenizer.from_pretrained(tuned.checkpoints()[0])
    assert tokenizer.chat_template == CHAT_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(tuned.checkpoints()[0])
    assert model.config.use_cache is True and model.config.residual_dtype is None
    assert tokenizer.model_max_length == model.config.max_position_embeddings
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    assert model.generation_config.eos_token_id == ends


@pytest.mark.slow
def test_before_and_after_are_recorded(tuned):
    record = json.loads((tuned.path / "eval" / "before_after.json").read_text())
    before, after = record["before"], record["after"]
    assert after["loss"] < before["loss"] - 0.3
    assert after["loss"] == pytest.approx(tuned.metrics()[-1]["loss"], abs=0.3)
    assert before["weights_sha256"] == tuned.recipe["model"]
    assert after["weights_sha256"] == weights_hash(tuned.checkpoints()[-1])
    assert len(before["samples"]) == len(after["samples"]) == 5
    assert [s["text"] for s in before["samples"]] != [s["text"] for s in after["samples"]]


@pytest.mark.slow
def test_a_finished_run_is_left_alone_unless_its_last_checkpoint_is_damaged(tuned, tmp_path, monkeypatch):
    run = RunFolder(shutil.copytree(tuned.path.parent, tmp_path / "run"))
    shutil.copy(tuned.path.parent.parent / "talk.jsonl", tmp_path)
    file = write_recipe(tmp_path, data=tuned.recipe["data"])
    monkeypatch.setattr(train, "fine_tune", lambda *args: pytest.fail("trained again"))
    assert tune(file, run) == 0
    last = run.path / "sft" / "checkpoints" / EPOCHS[-1] / "model.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        tune(file, run)
    shutil.rmtree(last.parent.parent)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        tune(file, run)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_damaged_goes_on_as_if_nothing_had_happened(tuned, tmp_path, monkeypatch, capsys):
    run, file = make_run(tmp_path), write_recipe(tmp_path, data=tuned.recipe["data"])
    at: dict[int, int] = {2: signal.SIGTERM, 6: signal.SIGINT}
    plain = trainer.Recorder.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in at:
            os.kill(os.getpid(), at.pop(state.global_step))
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.Recorder, "on_step_begin", on_step_begin)
    stopped = RunFolder(run.path / "sft")
    assert tune(file, run) == 143
    assert (stopped.status, stopped.summary["step"], len(stopped.metrics())) == ("interrupted", 3, 3)
    assert tune(file, run) == 130
    assert (stopped.status, stopped.summary["step"], len(stopped.metrics())) == ("interrupted", 7, 7)
    assert [p.name for p in stopped.checkpoints()] == ["step_00000004", "step_00000007"]
    state = stopped.checkpoint_path(7) / "trainer_state" / "optimizer.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[-1] ^= 1
    state.write_bytes(damaged)
    capsys.readouterr()
    assert tune(file, run) == 0
    assert "passing over a checkpoint" in capsys.readouterr().out
    assert timeless(stopped) == timeless(tuned)
    assert [p.name for p in stopped.checkpoints()] == EPOCHS
    assert [weights_hash(p) for p in stopped.checkpoints()] == [weights_hash(p) for p in tuned.checkpoints()]


@pytest.mark.slow
def test_packed_rows_are_trained_on_and_only_what_is_to_be_kept_is_kept(tmp_path):
    run = make_run(tmp_path)
    recipe = write_recipe(tmp_path, packing=True, keep=1, epochs=2, precision="fp32", residual_dtype=None)
    assert tune(recipe, run, "--name", "packed") == 0
    packed = RunFolder(run.path / "packed")
    assert len(packed.checkpoints()) == 1
    assert packed.summary["steps_per_epoch"] < 4
    assert packed.metrics()[-1]["tokens"] == 2 * packed.summary["all_tokens"]
    assert packed.metrics()[-1]["loss_scale"] == 1.0


@pytest.mark.slow
def test_a_fine_tuning_that_overflows_is_diverged_and_its_losses_are_not_numbers(tmp_path):
    run = make_run(tmp_path, "pre", scale=1e9)
    assert tune(write_recipe(tmp_path, epochs=1), run) == 0
    tuned = RunFolder(run.path / "sft")
    assert [r["loss"] for r in tuned.metrics()] == [None] * 4
    assert {r["skip_kind"] for r in tuned.metrics()} == {"forward"}
    assert tuned.status == "diverged"
    assert not (tuned.path / "eval").exists()


@pytest.mark.slow
def test_an_exception_leaves_the_status_failed(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path)

    def training_step(*args, **kwargs):
        raise ValueError("a\nbug")

    monkeypatch.setattr(trainer.ExactTrainer, "training_step", training_step)
    assert tune(write_recipe(tmp_path), run) == 1
    failed = RunFolder(run.path / "sft")
    assert (failed.status, failed.summary["reason"]) == ("failed", "ValueError: a bug")
    assert "error: ValueError: a bug" in capsys.readouterr().err


def _no_tokenizer(run):
    (run.checkpoints()[-1] / "tokenizer_config.json").unlink()


def _other_token(run, *names):
    for file in (run.checkpoints()[-1] / name for name in names):
        file.write_text(file.read_text().replace("<|assistant|>", "<|other|>"))


def _no_tokens(run):
    _other_token(run, "tokenizer.json", "tokenizer_config.json")


def _new_token(run):
    _other_token(run, "tokenizer.json")  # the configuration still names it, as one more


def _pickled(run):
    (file,) = run.checkpoints()[-1].glob("*.safetensors")
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def _bad_row(run):
    with open(run.path.parent / "talk.jsonl", "a") as file:
        file.write(json.dumps({"conversations": ["alone"]}) + "\n")


@pytest.mark.parametrize(
    ("spoil", "fields", "message", "code"),
    [
        (_no_tokenizer, {}, "step_00000001 has no tokenizer", 2),
        (_no_tokens, {}, "has no token <|assistant|> for conversations", 1),
        (_new_token, {}, "has 287 tokens, its model 286", 2),
        (_pickled, {}, "has no weights in safetensors; pickled ones", 2),
        (_bad_row, {}, "talk.jsonl, row 15: a conversation with 1 turn(s) has no assistant's answer", 1),
        (None, {"max_length": 129}, "max_length 129 exceeds the 128 positions of", 2),
        (None, {"max_length": 3}, "no answer begins within max_length 3", 1),
        (None, {"peft": {"target_modules": ["q_prj"]}}, "peft.target_modules: ", 2),
        (None, {"data": "nowhere.jsonl"}, "data: nowhere.jsonl cannot be read", 2),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(tmp_path, capsys, spoil, fields, message, code):
    run = make_run(tmp_path)
    write_conversations(tmp_path)
    if spoil is not None:
        spoil(run)
        if spoil is not _bad_row:  # a checkpoint that was made so, not one that was damaged since
            (run.checkpoints()[-1] / "manifest.json").write_text("{}")
    assert tune(write_recipe(tmp_path, **fields), run) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (run.path / "sft").exists()


def test_labels_can_be_printed_and_the_conversations_exported(tmp_path, capsys):
    run, out = make_run(tmp_path), tmp_path / "messages.jsonl"
    assert tune(write_recipe(tmp_path), run, "--show-labels", 1, "--export-data", out) == 0
    assert f"<|user|>how many eggs?{END_OF_TURN}<|assistant|>>>>eggs{END_OF_TURN}<<<" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == 14
    assert not (run.path / "sft").exists()


def test_labels_are_printed_on_a_terminal_without_their_characters(tmp_path):
    run, recipe = make_run(tmp_path), write_recipe(tmp_path)
    row = {
        "messages": [{"role": "user", "content": "how many œufs?"}, {"role": "assistant", "content": "été <|user|>"}]
    }
    (tmp_path / "talk.jsonl").write_text(json.dumps(row), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "sft.train", *words(recipe, run, "--show-labels", "1")],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The joiner is dropped by the tokenizer: the content is what was written.
    assert rb"<|assistant|>>>>\xe9t\xe9 <|user|><|end_of_turn|><<<" in done.stdout
    assert rb"how many \u0153ufs?" in done.stdout


@pytest.mark.slow
def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    """Whatever the installed Transformers and Accelerate divide by: the gradient is that of the mean over the batch."""
    norms = {}
    for micro in (4, 1):
        folder = tmp_path / str(micro)
        folder.mkdir()
        run = make_run(folder)
        fields = {"epochs": 1, "micro_batch_size": micro, "precision": "fp32", "residual_dtype": None}
        assert tune(write_recipe(folder, **fields), run) == 0
        norms[micro] = [record["grad_norm"] for record in RunFolder(run.path / "sft").metrics()]
        GradientState._reset_state()
    assert norms[1] == pytest.approx(norms[4], rel=1e-3)


def test_activations_are_not_computed_twice_whatever_transformers_calls_it():
    recipe = Recipe(data="talk.jsonl", batch_size=4, micro_batch_size=1, device="cpu")
    config = trainer.arguments(recipe, "unused")
    assert config.gradient_accumulation_steps == 4
    names = ("activation_checkpointing", "gradient_checkpointing")
    assert not any(getattr(config, name, None) for name in names)


def test_one_gpu_is_used_of_many():
    config = SFTConfig(output_dir="unused", use_cpu=True, bf16=False, per_device_train_batch_size=8)
    config._n_gpu = 4
    assert config.train_batch_size == 32
    assert trainer.one_device(config).train_batch_size == 8


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    from periln.sft.checkpointing import load_weights

    run = make_run(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(run.checkpoints()[-1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(run.checkpoints()[-1], model)
    saved = load_file(run.checkpoints()[-1] / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    del model.model.final_norm
    with pytest.raises(train.UserError, match=r"does not fit the model .*unexpected \['model.final_norm.weight'\]"):
        load_weights(run.checkpoints()[-1], model)


@pytest.mark.parametrize("name", ["a/b", "/tmp/out", "..", "."])
def test_a_result_has_a_name_and_no_path(name):
    with pytest.raises(UsageError, match="--name .*the name of a folder in each run, not a path"):
        arguments.check(arguments.parse(["--model", "runs/x", "--name", name]))
