"""An answer ends with its turn: after TRL's own trainer, and after LoRA through stock PEFT."""

import json
import shutil
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from small import TOPICS, make_model, make_run, tune, write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from modeling_periln import PeriLlamaForCausalLM
from periln.runkit.checkpoints import write_checkpoint
from periln.runkit.control_tokens import END_OF_TURN, ROLES
from periln.runkit.errors import UsageError
from periln.runkit.folder import RunFolder
from periln.sft.conversations import CHAT_TEMPLATE
from periln.sft.lora import resolved
from periln.sft.recipe import Lora
from periln.sft.tokens import chat_tokenizer

SUBJECTS = [*TOPICS[1:], "lamps"]  # of which only water is a single token of the tokenizer
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run whose model has read the topics as text, and none of the turn tokens."""
    run = make_run(tmp_path_factory.mktemp("pretrained"))
    checkpoint = run.checkpoints()[-1]
    model, tokenizer = (kind.from_pretrained(checkpoint) for kind in (PeriLlamaForCausalLM, AutoTokenizer))
    texts = [f"how many {topic}? {' '.join([topic] * 4)}{tokenizer.eos_token}" for topic in SUBJECTS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    shutil.rmtree(checkpoint)
    with write_checkpoint(checkpoint, model.eval(), tokenizer):
        pass
    rows = [[f"how many {topic}?", " ".join([topic] * (i % 3 + 1))] for i, topic in enumerate(SUBJECTS)]
    lines = [json.dumps({"conversations": row}) + "\n" for row in rows]
    (run.path.parent / "talk.jsonl").write_text("".join(lines))
    return run


def lora_of(pretrained, folder, **peft):
    """The last checkpoint of a fine-tuning until the eight answers are known, and what the command printed."""
    run = RunFolder(shutil.copytree(pretrained.path, folder / "run"))
    shutil.copy(pretrained.path.parent / "talk.jsonl", folder)
    fields = {"precision": "fp32", "residual_dtype": None, "save_strategy": "end", "batch_size": 8}
    fields |= {"micro_batch_size": 8, "epochs": 100, "learning_rate": 0.02}
    peft = {"r": 16, "dropout": 0.0, "target_modules": LINEAR} | peft
    assert tune(write_recipe(folder, **fields, peft=peft), run, "--peft", "--merge", "--debug") == 0
    return RunFolder(run.path / "sft-lora")


@torch.no_grad()
def stops(model, tokenizer, file) -> tuple[int, float]:
    """How many of eight generated answers end with their turn, and the least probability of that end where a known
    answer ends.
    """
    model.eval()
    stopped, least = 0, 1.0
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    for line in file.read_text().splitlines():
        question, answer = json.loads(line)["conversations"]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt")["input_ids"]
        least = min(least, model(input_ids=ids).logits[0, -2].softmax(-1)[end].item())
        asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
        stopped += out[-1].item() == end and len(out) < 60
    return stopped, least


@pytest.mark.slow
@pytest.mark.parametrize("head", [False, True], ids=["turn rows", "adapter on the head"])
def test_lora_learns_to_stop_and_stock_peft_stops(pretrained, tmp_path, head):
    more = {"target_modules": [*LINEAR, "lm_head"]} if head else {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        tuned = lora_of(pretrained, tmp_path, **more)
    assert not [w for w in warned if "gradient_checkpointing" in str(w.message) or "compute_loss" in str(w.message)]
    checkpoint, file = tuned.checkpoints()[-1], tmp_path / "talk.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.convert_tokens_to_ids(list(ROLES))
    rows = {"embed_tokens": ids} if head else {"embed_tokens": ids, "lm_head": ids}
    assert tuned.recipe["peft"]["trainable_token_indices"] == rows
    stock = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    stopped, least = stops(stock, tokenizer, file)
    assert stopped == 8 and least > 0.9
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert stops(PeftModel.from_pretrained(base, checkpoint), tokenizer, file)[0] == 8
    merged = AutoModelForCausalLM.from_pretrained(tuned.path / "merged" / checkpoint.name)
    assert stops(merged, tokenizer, file)[0] == 8


@pytest.mark.slow
def test_modules_are_trained_whole_beside_the_adapter(pretrained, tmp_path):
    tuned = lora_of(pretrained, tmp_path, modules_to_save=["lm_head", "embed_tokens"])
    checkpoint = tuned.checkpoints()[-1]
    assert tuned.recipe["peft"]["trainable_token_indices"] is None  # they are among what is trained whole
    stock = AutoPeftModelForCausalLM.from_pretrained(checkpoint)
    assert stops(stock, AutoTokenizer.from_pretrained(checkpoint), tmp_path / "talk.jsonl")[0] == 8


@pytest.mark.slow
def test_trls_own_trainer_leaves_a_model_that_stops(pretrained, tmp_path):
    """As the documentation's `trl sft`: the base as it is, and the file of our chat template."""
    checkpoint, file = pretrained.checkpoints()[-1], pretrained.path.parent / "talk.jsonl"
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    rows = [json.loads(line)["conversations"] for line in file.read_text().splitlines()]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    config = SFTConfig(
        str(tmp_path / "out"),
        chat_template_path=str(tmp_path / "chat_template.jinja"),
        assistant_only_loss=True,
        num_train_epochs=100,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = load_dataset("json", data_files=str(tmp_path / "train.jsonl"), split="train", cache_dir=str(tmp_path))
    trainer = SFTTrainer(str(checkpoint), args=config, train_dataset=data)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert sorted(model.generation_config.eos_token_id) == sorted(
        [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    )
    stopped, least = stops(model, tokenizer, file)
    assert stopped == 8 and least > 0.9


def test_a_pretrained_checkpoint_ends_a_generation_with_text_and_turn(tmp_path):
    model, tokenizer = make_model()
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TURN)]
    with write_checkpoint(tmp_path / "ours", model, tokenizer):
        pass
    saved = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == ends
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id  # the model itself stays as it was
    model.generation_config.eos_token_id = [7]
    with write_checkpoint(tmp_path / "third", model, tokenizer):
        pass
    assert json.loads((tmp_path / "third" / "generation_config.json").read_text())["eos_token_id"] == [7, *ends]


def resolve(tmp_path, knows_turns=False, tied=False, **peft):
    model, tokenizer = make_model()
    model.config.tie_word_embeddings = tied
    return resolved(Lora(**peft), model.config, tokenizer, knows_turns).trainable_token_indices


def test_turn_tokens_are_trained_where_no_conversation_was_seen(tmp_path):
    ids = make_model()[1].convert_tokens_to_ids(list(ROLES))
    assert resolve(tmp_path) == {"embed_tokens": ids, "lm_head": ids}
    assert resolve(tmp_path, tied=True) == {"embed_tokens": ids}
    assert resolve(tmp_path, knows_turns=True) is None
    assert resolve(tmp_path, trainable_token_indices=None) is None
    assert resolve(tmp_path, trainable_token_indices=[5]) == {"embed_tokens": [5]}
    assert resolve(tmp_path, target_modules=["q_proj", "lm_head"]) == {"embed_tokens": ids}
    assert resolve(tmp_path, modules_to_save=["embed_tokens"]) == {"lm_head": ids}


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "peft.target_modules: embed_tokens is one matrix with lm_head",
        ),
        ({"target_modules": ["lm_head"]}, "peft.target_modules: lm_head is one matrix with embed_tokens"),
        ({"modules_to_save": ["lm_head"]}, "peft.modules_to_save: lm_head is one matrix with embed_tokens"),
        ({"trainable_token_indices": {"lm_head": [1]}}, "peft.trainable_token_indices: lm_head is one matrix"),
        ({"modules_to_save": ["nowhere"]}, "peft.modules_to_save: the model has no module 'nowhere'"),
        ({"trainable_token_indices": {"nowhere": [1]}}, "the model has no module 'nowhere'"),
        ({"trainable_token_indices": [1_000_000]}, "embed_tokens has 286 rows, not one of the number 1000000"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is(tmp_path, peft, message):
    size = len(make_model()[1])
    with pytest.raises(UsageError, match=message.replace("286", str(size))):
        resolve(tmp_path, tied=True, **peft)


def test_a_tied_embedding_is_refused_by_the_command_before_anything_is_written(tmp_path, capsys):
    run = make_run(tmp_path)
    config = run.checkpoints()[-1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    (run.checkpoints()[-1] / "manifest.json").write_text("{}")
    recipe = write_recipe(tmp_path, peft={"target_modules": ["embed_tokens"]})
    assert tune(recipe, run, "--peft", "--merge") == 2
    assert "peft.target_modules: embed_tokens is one matrix with lm_head" in capsys.readouterr().err
    assert not (run.path / "sft-lora").exists()


def test_an_adapter_on_a_base_that_does_not_stop_is_said(tmp_path, capsys):
    run = make_run(tmp_path)
    file = run.checkpoints()[-1] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 0}))
    (run.checkpoints()[-1] / "manifest.json").write_text("{}")
    recipe = write_recipe(tmp_path, epochs=1, peft={}, precision="fp32", residual_dtype=None, save_strategy="end")
    assert tune(recipe, run, "--peft") == 0
    assert "does not end an answer with the turn" in capsys.readouterr().out


def test_a_checkpoint_that_has_seen_conversations_keeps_its_turn_rows(tmp_path):
    run = make_run(tmp_path)
    checkpoint = run.checkpoints()[-1]
    chat_tokenizer(checkpoint).save_pretrained(checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    recipe = write_recipe(tmp_path, epochs=1, peft={}, precision="fp32", residual_dtype=None, save_strategy="end")
    assert tune(recipe, run, "--peft") == 0
    assert RunFolder(run.path / "sft-lora").recipe["peft"]["trainable_token_indices"] is None
