"""Libraries that ask for a class by its name know ours: installed, wrapped by PEFT or FSDP2, or as remote code.

The expensive case is the Trainer's label smoothing: of a class that it does not know as a causal LM it does not shift
the labels, and the model learns to repeat its input.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_ids, shaken_model, tiny_config
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary

from modeling_periln import (
    PeriLlamaForQuestionAnswering,
    PeriLlamaForSequenceClassification,
    PeriLlamaForTokenClassification,
)

pytest.importorskip("accelerate", reason="the Trainer needs it")
EPSILON = 0.2
IDS = random_ids(4, 12)
LABELS = IDS.masked_fill(torch.arange(12) < torch.tensor([[0], [3], [7], [10]]), -100)


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, epsilon: float = EPSILON) -> float:
    """By hand: token t + 1 is the label of position t; epsilon of the mass is spread over the whole vocabulary."""
    losses = []
    for row, targets in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row[:-1], targets[1:], strict=True):
            if target != -100:
                log_z = torch.tensor(scores, dtype=torch.float64).logsumexp(0).item()
                mean = log_z - sum(scores) / len(scores)
                losses.append((1 - epsilon) * (log_z - scores[target]) + epsilon * mean)
    return sum(losses) / len(losses)


def trainer_of(model: nn.Module, folder: Path, **more) -> Trainer:
    """A Trainer for one step over all rows that changes no weight."""
    arguments = TrainingArguments(
        str(folder),
        label_smoothing_factor=EPSILON,
        per_device_train_batch_size=4,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **more,
    )
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def adapted(model: nn.Module, method: str, **more) -> nn.Module:
    peft = pytest.importorskip("peft", reason="adapters are PEFT's")
    torch.manual_seed(0)
    return peft.get_peft_model(model, getattr(peft, method)(task_type="CAUSAL_LM", **more))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "alone": lambda model: model,
    "lora": lambda model: adapted(model, "LoraConfig", r=4, init_lora_weights=False),
    "ia3": lambda model: adapted(model, "IA3Config"),
    "prefix": lambda model: adapted(model, "PrefixTuningConfig", num_virtual_tokens=3),
}


@pytest.mark.parametrize("placement", ["post", "peri"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_label_smoothing_shifts_the_labels(wrapper, placement, tmp_path):
    model = WRAPPERS[wrapper](shaken_model(norm_placement=placement))
    with torch.no_grad():
        expected = smoothed_loss(model.eval()(input_ids=IDS).logits, LABELS)
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)  # the log has four decimals
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("how", ["by the Trainer", "before", "with an adapter"])
def test_label_smoothing_shifts_the_labels_of_a_compiled_model(how, tmp_path):
    """torch.compile puts the model into a wrapper with another name."""
    model = shaken_model() if how != "with an adapter" else WRAPPERS["lora"](shaken_model())
    with torch.no_grad():
        expected = smoothed_loss(model.eval()(input_ids=IDS).logits, LABELS)
    if how == "before":
        trainer = trainer_of(
            torch.compile(model, backend="eager"), tmp_path, remove_unused_columns=False, label_names=["labels"]
        )
    else:
        trainer = trainer_of(model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_compiled_models_of_others_and_other_heads_keep_their_names():
    config = LlamaConfig(vocab_size=61, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    assert torch.compile(LlamaForCausalLM(config))._get_name() == "OptimizedModule"
    assert torch.compile(nn.Linear(2, 2))._get_name() == "OptimizedModule"
    head = PeriLlamaForTokenClassification(tiny_config(num_labels=3))
    assert torch.compile(head)._get_name() == "PeriLlamaForTokenClassification"  # whose labels are not shifted


def test_without_smoothing_the_reference_is_the_models_own_loss():
    with torch.no_grad():
        output = shaken_model()(IDS, labels=LABELS)
    assert smoothed_loss(output.logits, LABELS, epsilon=0.0) == pytest.approx(output.loss.item(), rel=1e-6)


def test_labels_of_tokens_are_not_shifted(tmp_path):
    """A token's class is that token's: smoothing leaves the labels of the other heads where they are."""
    model = PeriLlamaForTokenClassification(tiny_config(num_labels=61)).eval()
    trainer = trainer_of(model, tmp_path)
    with torch.no_grad():
        loss = trainer.compute_loss(model, {"input_ids": IDS, "labels": LABELS}).item()
        logits = model(IDS).logits
    moved = torch.cat([torch.full((4, 1), -100), LABELS], dim=1)  # so that the reference's shift undoes itself
    assert loss == pytest.approx(smoothed_loss(torch.cat([logits, logits[:, :1]], dim=1), moved), rel=1e-5)


# Others that ask for a name


@pytest.mark.parametrize(
    ("task", "model_class"),
    [
        ("text-generation", None),
        ("question-answering", PeriLlamaForQuestionAnswering),
        ("text-classification", PeriLlamaForSequenceClassification),
        ("token-classification", PeriLlamaForTokenClassification),
    ],
)
def test_the_trainers_model_card_names_the_task(task, model_class, tmp_path):
    model = shaken_model() if model_class is None else model_class(tiny_config(pad_token_id=60))
    assert TrainingSummary.from_trainer(trainer_of(model, tmp_path), model_name="tiny").tasks == task


def test_accelerate_does_not_build_megatrons_llama_in_our_place():
    """It searches the model's type for the names that it knows, and `peri_llama` has one of them in it."""
    from accelerate.utils import dataclasses

    def arguments_for(model) -> dict:
        plugin = SimpleNamespace(megatron_lm_default_args={}, seq_length=8, return_logits=True)
        dataclasses.MegatronLMPlugin.set_network_size_args(plugin, model)
        return plugin.megatron_lm_default_args

    with pytest.raises(ValueError, match="Megatron-LM plugin cannot train peri_llama"):
        arguments_for(shaken_model())
    llama = SimpleNamespace(config=LlamaConfig(hidden_size=64))
    assert arguments_for(llama)["hidden_size"] == 64  # others are built as before


# Remote code, in a process that cannot import the package

FRESH = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):  # as if the package were not installed, even where it is
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_periln":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch
from torch.distributed import init_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

folder, epsilon = sys.argv[1], float(sys.argv[2])
inputs = {name: torch.tensor(rows) for name, rows in json.loads(sys.argv[3]).items()}

def load():
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

def loss_of(model):
    arguments = TrainingArguments(folder, label_smoothing_factor=epsilon, use_cpu=True, report_to="none")
    with torch.no_grad():
        return Trainer(model, arguments).compute_loss(model, dict(inputs)).item()

model = load()
assert type(model).__module__.startswith("transformers_modules")
losses = {"alone": loss_of(model)}
try:
    from peft import LoraConfig, get_peft_model
except ModuleNotFoundError:
    pass
else:
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    losses["lora"] = loss_of(get_peft_model(load(), lora))  # as it is initialized it changes nothing
losses["compiled"] = loss_of(torch.compile(load(), backend="eager"))
init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sharded = load()
fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
losses["FSDP2"] = loss_of(sharded)
print("LOSSES" + json.dumps(losses))
"""


@pytest.mark.slow
def test_label_smoothing_shifts_the_labels_of_remote_code(tmp_path):
    model = shaken_model()
    model.save_pretrained(tmp_path / "model")
    inputs = json.dumps({"input_ids": IDS.tolist(), "labels": LABELS.tolist()})
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, str(tmp_path / "model"), str(EPSILON), inputs],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(done.stdout.rpartition("LOSSES")[2])
    with torch.no_grad():
        expected = smoothed_loss(model(IDS).logits, LABELS)
    assert {"alone", "FSDP2"} <= set(losses)
    assert losses == pytest.approx(dict.fromkeys(losses, expected), rel=1e-5)
