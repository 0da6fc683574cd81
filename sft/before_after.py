"""A model before and after its fine-tuning: loss on the conversations, and the same five questions answered by both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from periln.runkit.folder import RunFolder, read_json, weights_hash, write_json
from periln.sft.base import load_float32
from periln.sft.own_template import own_template
from periln.sft.tokens import IGNORED, Tokens, turn_end

FILE = "before_after.json"
LOSS_CONVERSATIONS = 200  # how many of the first
NEW_TOKENS = 60
QUESTIONS = (
    "How do I boil an egg?",
    "Write a Python function that adds two numbers.",
    "What is the difference between weather and climate?",
    "Give me three ideas for a rainy Sunday afternoon.",
    "Explain to a child why the sky is blue.",
)


@torch.no_grad()
def conversation_loss(model: PreTrainedModel, tokens: Tokens, pulse: Callable[[], None]) -> dict[str, Any]:
    """Mean loss of an assistant's token over the first conversations, in the model's own precision."""
    total, count = 0.0, 0
    for ids, labels in zip(tokens.ids[:LOSS_CONVERSATIONS], tokens.labels[:LOSS_CONVERSATIONS], strict=True):
        pulse()
        batch = {
            name: torch.tensor([row], device=model.device) for name, row in (("input_ids", ids), ("labels", labels))
        }
        kept = sum(label != IGNORED for label in labels[1:])
        total += model(**batch, use_cache=False).loss.item() * kept if kept else 0.0
        count += kept
    mean = total / max(count, 1)
    finite = mean if torch.isfinite(torch.tensor(mean)) else None
    return {"loss": finite, "conversations": min(len(tokens.ids), LOSS_CONVERSATIONS), "assistant_tokens": count}


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pulse: Callable[[], None]) -> list[dict]:
    """The greedy answer to each of the five questions."""
    own = own_template(tokenizer)
    more = own.more if own is not None else {}  # the date that was trained with, not the day's
    out, ends = [], [end for end in (tokenizer.eos_token_id, turn_end(tokenizer)) if end is not None]
    for question in QUESTIONS:
        pulse()
        turns = [{"role": "user", "content": question}]
        said = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", **more)
        ids = said["input_ids"]
        ids = ids.to(model.device)
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(NEW_TOKENS, max(1, model.config.max_position_embeddings - ids.shape[1])),
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id,
        )
        text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        out.append({"prompt": question, "text": text})
    return out


def record_before_after(
    run: RunFolder,
    before: Path,
    after: Path,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    pulse: Callable[[], None],
) -> None:
    """Write eval/before_after.json of two checkpoints, unless it is there for these weights.

    `pulse` is called between pieces of work and may raise.
    """
    file = run.path / "eval" / FILE
    hashes = {"before": weights_hash(before), "after": weights_hash(after)}
    if file.exists():
        old = read_json(file)
        if {name: old[name]["weights_sha256"] for name in hashes} == hashes:
            return
    record: dict[str, Any] = {
        "evaluated": {"path": str(after.relative_to(run.path)), "revision": None, "weights_sha256": hashes["after"]},
        "harness": None,
        "suite": None,
        "limit": None,
        "loss_on": "the conversations that were trained on, assistant's tokens only",
        "answers": "greedy",
        "dtype": "float32",
    }
    for name, checkpoint in (("before", before), ("after", after)):
        model = load_float32(checkpoint).to(device).eval()
        record[name] = {"weights_sha256": hashes[name]} | conversation_loss(model, tokens, pulse)
        record[name]["samples"] = answers(model, tokenizer, pulse)
    write_json(file, record)
