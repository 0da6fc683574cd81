"""Transformers' Trainer with this family: accumulated gradients, and evaluation with metrics."""

from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, shaken_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="the Trainer needs it")
IDS = random_ids(4, 12)
COUNTED = (12, 2, 5, 9)  # the labels from the second to this one count
PLACE = torch.arange(12)  # the first has no prediction; earlier versions of Transformers count it all the same
ROWS = [
    {"input_ids": row, "labels": row.masked_fill((counted <= PLACE) | (PLACE == 0), -100)}
    for row, counted in zip(IDS, COUNTED, strict=True)
]


def trainer_of(folder: Path, model=None, **more) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        **{"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "seed": 3} | more,
    )
    return Trainer(model or shaken_model(), arguments, train_dataset=ROWS, eval_dataset=ROWS)


@pytest.mark.parametrize("rows", [1, 2])
def test_accumulated_gradients_weigh_every_label_the_same(rows, tmp_path):
    """Micro-batches with unequal numbers of labels: a step is the step of the whole batch."""
    norms = []
    for size in (4, rows):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
        llama.load_state_dict({name: torch.full_like(value, 0.1) for name, value in llama.state_dict().items()})
        trainer = trainer_of(tmp_path, llama, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    if norms[1] != pytest.approx(norms[0], rel=1e-3):
        pytest.skip("these versions of Transformers and Accelerate divide twice by the accumulation, of a Llama too")
    weights, losses = [], []
    for size in (4, rows):
        trainer = trainer_of(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=4 // size)
        trainer.train()
        weights.append({name: weight.detach().clone() for name, weight in trainer.model.named_parameters()})
        losses.append(trainer.state.log_history[0]["loss"])
    before = dict(shaken_model().named_parameters())
    for name, weight in weights[0].items():
        assert not torch.equal(weight, before[name]), name
        assert torch.allclose(weights[1][name], weight, rtol=1e-5, atol=1e-6), name
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    with torch.no_grad():  # the mean over all labels, not the mean of the rows' means
        logits = shaken_model()(IDS).logits[:, :-1].double().log_softmax(-1)
    labels = torch.stack([row["labels"] for row in ROWS])[:, 1:]
    nll = -logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100]
    assert losses[0] == pytest.approx(nll.mean().item(), rel=1e-5)


def test_evaluation_hands_logits_and_labels_to_the_metrics_and_nothing_else(tmp_path):
    seen = {}

    def metrics(prediction) -> dict[str, float]:
        seen["logits"], seen["labels"] = prediction.predictions, prediction.label_ids
        guessed, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": float((guessed == labels)[labels != -100].mean())}

    trainer = trainer_of(tmp_path, per_device_eval_batch_size=3)  # the last batch is smaller
    trainer.compute_metrics = metrics
    found = trainer.evaluate()
    with torch.no_grad():
        expected = shaken_model()(IDS).logits
    assert torch.allclose(torch.tensor(seen["logits"]), expected, atol=1e-5)
    labels = torch.stack([row["labels"] for row in ROWS])
    assert torch.equal(torch.tensor(seen["labels"]), labels)
    right = (expected[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
    assert found["eval_accuracy"] == pytest.approx(right.double().mean().item())
