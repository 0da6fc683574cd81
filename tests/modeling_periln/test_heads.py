"""The heads for classification, tagging and question answering: Transformers' own, over our base model."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from test_remote_code import FRESH
from tiny_models import random_ids, shaken, shaken_model, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from modeling_periln import PeriLlamaForTokenClassification

PAD = 60
HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"score.weight"}),
    "token": (AutoModelForTokenClassification, {"score.weight", "score.bias"}),
    "question": (AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
}
heads = pytest.mark.parametrize("head", HEADS)


def headed(head: str, seed: int = 0, **changes):
    """A model with this head and three labels, its weights far from their initial values."""
    changes = {"num_labels": 3, "pad_token_id": PAD, **changes}
    return shaken(HEADS[head][0].from_config(tiny_config(**changes)), seed + 1).eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of 4, 9 and 6 tokens, padded on one side, and their mask."""
    ids, mask = torch.full((3, 9), PAD), torch.zeros(3, 9, dtype=torch.long)
    for row, length in enumerate((4, 9, 6)):
        place = slice(9 - length, 9) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = random_ids(1, length, vocab=PAD, seed=length)[0], 1
    return ids, mask


def logits_of(output) -> torch.Tensor:
    """All logits of any of the heads."""
    return output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), -1)


# Checkpoints


@heads
@pytest.mark.parametrize("placement", ["post", "peri"])
def test_a_head_is_put_on_a_language_model(head, placement, tmp_path):
    language_model = shaken_model(norm_placement=placement)
    language_model.save_pretrained(tmp_path)
    auto_class, new = HEADS[head]
    model, report = auto_class.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert report["missing_keys"] == new
    assert report["unexpected_keys"] == {"lm_head.weight"}
    backbone = language_model.model.state_dict()
    assert model.model.state_dict().keys() == backbone.keys()
    assert all(torch.equal(tensor, backbone[key]) for key, tensor in model.model.state_dict().items())
    state = model.state_dict()
    for key in new:
        labels = 2 if head == "question" else 3
        assert state[key].shape == ((labels, 20) if key.endswith("weight") else (labels,))
        assert 0.01 < state[key].std() < 0.03 if key.endswith("weight") else not state[key].any()


@heads
def test_a_model_with_a_head_is_saved_and_loaded(head, tmp_path):
    model = headed(head)
    model.save_pretrained(tmp_path)
    loaded, report = HEADS[head][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(loaded) is type(model)
    assert loaded.config.num_labels == 3
    ids, mask = padded("right")
    assert torch.equal(logits_of(loaded(ids, attention_mask=mask)), logits_of(model(ids, attention_mask=mask)))


# Logits and losses


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sequence_is_classified_at_its_last_token_that_is_not_padding(side):
    model = headed("sequence")
    ids, mask = padded(side)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    last = [8, 8, 8] if side == "left" else [3, 8, 5]
    expected = hidden[torch.arange(3), last] @ model.score.weight.T
    output = model(ids, attention_mask=mask, labels=torch.tensor([2, 0, 1]))
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert torch.allclose(output.loss, F.cross_entropy(expected, torch.tensor([2, 0, 1])))
    alone = torch.cat([model(ids[row : row + 1, mask[row].bool()]).logits for row in range(3)])
    assert torch.allclose(output.logits, alone, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "labels", "loss"),
    [
        ({"num_labels": 1}, torch.tensor([0.5, -1.0, 2.0]), lambda x, y: F.mse_loss(x[:, 0], y)),
        (
            {"problem_type": "multi_label_classification"},
            torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 0]]),
            F.binary_cross_entropy_with_logits,
        ),
    ],
    ids=["regression", "several labels"],
)
def test_a_sequence_can_have_a_number_or_several_labels(changes, labels, loss):
    model = headed("sequence", **changes)
    output = model(padded("right")[0], labels=labels)
    assert torch.allclose(output.loss, loss(output.logits, labels))


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_token_is_classified(side):
    model = headed("token")
    ids, mask = padded(side)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    expected = hidden @ model.score.weight.T + model.score.bias
    labels = (ids % 3).masked_fill(mask == 0, -100)
    output = model(ids, attention_mask=mask, labels=labels)
    assert torch.allclose(output.logits, expected, atol=1e-6)
    assert torch.allclose(output.loss, F.cross_entropy(expected[mask.bool()], labels[mask.bool()]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_ends_of_an_answer_are_two_distributions_over_the_tokens(side):
    model = headed("question")
    ids, mask = padded(side)
    hidden = model.model(ids, attention_mask=mask).last_hidden_state
    start, end = (hidden @ model.qa_outputs.weight.T + model.qa_outputs.bias).unbind(-1)
    starts, ends = torch.tensor([1, 4, 2]), torch.tensor([3, 7, 2])
    output = model(ids, attention_mask=mask, start_positions=starts, end_positions=ends)
    assert torch.allclose(output.start_logits, start, atol=1e-6)
    assert torch.allclose(output.end_logits, end, atol=1e-6)
    expected = (F.cross_entropy(start, starts) + F.cross_entropy(end, ends)) / 2
    assert torch.allclose(output.loss, expected, atol=1e-6)


def test_classifier_dropout_acts_on_tags_in_training_only():
    config = tiny_config(classifier_dropout=0.5, num_labels=3)
    model = shaken(PeriLlamaForTokenClassification(config)).eval()
    ids = random_ids()
    assert torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    dropped = []
    model.dropout.register_forward_hook(lambda m, args, out: dropped.append((out == 0).float().mean().item()))
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert all(0.3 < share < 0.7 for share in dropped)
    model.config.classifier_dropout = 0.0
    assert PeriLlamaForTokenClassification(model.config).dropout.p == 0.0


@heads
def test_a_head_and_everything_below_it_learn(head):
    model = headed(head).train()
    ids, _ = padded("right")
    more = {"sequence": {"labels": torch.tensor([0, 1, 2])}, "token": {"labels": ids % 3}}
    more["question"] = {"start_positions": torch.tensor([1, 4, 2]), "end_positions": torch.tensor([3, 7, 2])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(ids, use_cache=False, **more[head]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


# Where users meet them


def test_the_text_classification_pipeline_runs(tmp_path):
    words = {word: i for i, word in enumerate(["[UNK]", "good", "bad", "film", "a", "very"])} | {"[PAD]": PAD}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    names = {0: "good", 1: "bad", 2: "mixed"}
    model = headed("sequence", id2label=names, label2id={v: k for k, v in names.items()})
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu", batch_size=2)
    texts = ["a good film", "bad", "a very very bad film"]
    answers = classify(texts, top_k=None)
    for text, answer in zip(texts, answers, strict=True):
        scores = model(tokenizer(text, return_tensors="pt").input_ids).logits.softmax(-1)[0]
        assert {a["label"]: pytest.approx(a["score"], abs=1e-5) for a in answer} == {
            names[i]: score.item() for i, score in enumerate(scores)
        }


WITHOUT_PACKAGE = (
    FRESH.split("from transformers import")[0]
    + """
import transformers

root, ids = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
report = {}
for folder in sorted(root.iterdir()):
    auto_class = getattr(transformers, "AutoModelFor" + folder.name)
    model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        output = model(ids)
    logits = output.logits if "logits" in output else torch.stack((output.start_logits, output.end_logits), -1)
    classes = [type(model).__module__.split(".")[0], type(model).__name__]
    report[folder.name] = {"logits": logits.tolist(), "classes": classes}
print("REPORT" + json.dumps(report))
"""
)


@pytest.mark.slow
def test_the_heads_load_where_the_package_is_not_installed(tmp_path):
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    names = {head: auto_class.__name__.removeprefix("AutoModelFor") for head, (auto_class, _) in HEADS.items()}
    for head, name in names.items():
        headed(head).save_pretrained(checkpoints / name)
    ids = random_ids(vocab=PAD)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-c", WITHOUT_PACKAGE, str(checkpoints), json.dumps(ids.tolist())]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.rpartition("REPORT")[2])
    for head, name in names.items():
        assert report[name]["classes"] == ["transformers_modules", f"PeriLlamaFor{name}"]
        assert torch.equal(torch.tensor(report[name]["logits"]), logits_of(headed(head)(ids)))
