"""SmolLM2-135M-Instruct fine-tuned on LIMA with its own ChatML template: LoRA and all weights, 20 steps each."""

import json

import pandas as pd
import pytest
import torch
from doors import HUB, load, periln, record
from published_models import model_folder
from transformers import AutoTokenizer

from periln.runkit.folder import read_json

pytestmark = [pytest.mark.published, pytest.mark.slow]
STEPS, ROWS, LENGTH, NEW_TOKENS = 20, 2, 160, 120  # steps of ROWS conversations of at most LENGTH tokens
QUESTIONS = ("What is the capital of France?", "How many days are in a week?", "Say hello to my friend Anna.")
KINDS = {"full": (2e-5, []), "lora": (2e-4, ["--peft", "--merge"])}  # the learning rate, and words of the command


@pytest.fixture(scope="module")
def lima() -> list[list[str]]:
    files = sorted(HUB.glob("GAIR/lima/plain_text/train*.parquet"))
    if not files:
        pytest.skip(f"LIMA is not in {HUB}: name the data with PUBLISHED_DATA")
    return [list(row) for row in pd.read_parquet(files[0])["conversations"]]


def write(rows: list[list[str]], file) -> None:
    file.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))


@torch.no_grad()
def answers(folder) -> list[dict]:
    """The greedy answers as any user's `generate` gives them, and whether each ended by itself."""
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    end, found = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        out = model.generate(**asked, max_new_tokens=NEW_TOKENS, do_sample=False)[0, asked["input_ids"].shape[1] :]
        text = tokenizer.decode(out, skip_special_tokens=True)
        found.append({"question": question, "answer": text, "tokens": len(out), "ended": out[-1].item() == end})
    return found


def test_what_is_trained_is_the_answer_and_its_end(lima, tmp_path):
    """The two rows that are left out of the thousand begin with white space that joins the prompt's last token."""
    (tmp_path / "smollm2").symlink_to(model_folder("smollm2"))
    write([lima[0], lima[53]], tmp_path / "lima.jsonl")
    words = ["--model", tmp_path / "smollm2", "--set", f"data={tmp_path / 'lima.jsonl'}"]
    said = periln("sft", *words, "--show-labels", 2)
    question, answer = lima[0]
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert said.endswith(f"{prompt}>>>{answer}<|im_end|><<<\n\n") and said.count(">>>") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_on_lima_lower_the_loss_and_answers_end(lima, tmp_path, kind):
    source = model_folder("smollm2")
    (tmp_path / "smollm2").symlink_to(source)
    tokenizer, short = AutoTokenizer.from_pretrained(source), []
    for question, answer, *more in lima:  # whole ones, with their ends: cut answers teach a model not to stop
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if not more and len(tokenizer.apply_chat_template(turns)["input_ids"]) <= LENGTH:
            short.append([question, answer])
    write(short[: STEPS * ROWS], tmp_path / "lima.jsonl")
    rate, options = KINDS[kind]
    fields = {"epochs": 1, "batch_size": ROWS, "micro_batch_size": ROWS, "max_length": LENGTH, "learning_rate": rate}
    fields |= {"data": tmp_path / "lima.jsonl", "save_strategy": "end"}
    words = [f"{name}={value}" for name, value in fields.items()]
    periln("sft", "--model", tmp_path / "smollm2", "--name", kind, *options, "--set", *words)
    run = tmp_path / f"smollm2-{kind}"
    out = next((run / ("merged" if kind == "lora" else "checkpoints")).iterdir())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    both, summary = read_json(run / "eval" / "before_after.json"), read_json(run / "summary.json")
    assert (summary["truncated"], summary["dropped"]) == (0, 0)
    given = answers(out)
    losses = {when: both[when]["loss"] for when in ("before", "after")}
    said = {"rows": STEPS * ROWS, "max_length": LENGTH, "learning_rate": rate, "precision": "fp16"}
    said |= {
        "cut": summary["truncated"],
        "losses": [step["loss"] for step in steps],
        "skipped": summary["skipped_steps"],
        **losses,
    }
    record(f"smollm2_sft_{kind}", said | {"new_tokens": NEW_TOKENS, "answers": given})
    assert len(steps) == STEPS and summary["status"] == "completed" and summary["skipped_steps"] < STEPS / 2
    assert losses["after"] < losses["before"] - 0.01
    assert any(one["ended"] for one in given)
    assert read_json(out / "generation_config.json")["eos_token_id"] in (2, [2])
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
