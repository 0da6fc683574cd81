"""TRL's preference, reinforcement and reward trainers take a checkpoint by its path, without the package.

The first loss of DPO and the first divergence of GRPO are known: policy and reference are still the same model.
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import shaken_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

for _package in ("trl", "datasets", "accelerate"):
    pytest.importorskip(_package, reason="TRL's trainers")
pytestmark = pytest.mark.slow

FRESH = """
import importlib.abc, json, sys

class Absent(importlib.abc.MetaPathFinder):  # as if the package were not installed, even where it is
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_periln":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

folder, out, report = *sys.argv[1:3], {}
pairs = Dataset.from_list(
    [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i}"} for i in range(1, 9)]
)

def train(name, trainer_class, config_class, rows, config={}, **more):
    common = {"trust_remote_code": True, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1, "learning_rate": 1e-2}
    arguments = config_class(output_dir=out, disable_tqdm=True, **common | config)
    trainer = trainer_class(model=folder, args=arguments, train_dataset=rows, **more)
    trainer.train()
    logs = [{k: v for k, v in log.items() if isinstance(v, float)} for log in trainer.state.log_history[:-1]]
    report[name] = {"logs": logs, "module": type(trainer.model).__module__, "class": type(trainer.model).__name__}

train("dpo", DPOTrainer, DPOConfig, pairs)
train("reward", RewardTrainer, RewardConfig, pairs)
grpo = {"num_generations": 4, "max_completion_length": 5, "beta": 0.1}
prefers = lambda completions, **_: [float(text.count("1")) for text in completions]
train("grpo", GRPOTrainer, GRPOConfig, pairs.select_columns(["prompt"]), grpo, reward_funcs=prefers)
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("trl")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    shaken_model(pad_token_id=60, eos_token_id=59).save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w60", eos_token="w59")
    tokenizer.save_pretrained(folder / "model")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", FRESH, str(folder / "model"), str(folder / "out")],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[y/N]" not in done.stdout + done.stderr
    found = json.loads(done.stdout.rpartition("REPORT")[2])
    assert all(one["module"].startswith("transformers_modules") for one in found.values())
    return found


def test_the_first_loss_of_dpo_is_the_logarithm_of_two_and_then_it_falls(report):
    logs = report["dpo"]["logs"]
    assert len(logs) == 4
    assert logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert logs[0]["rewards/chosen"] == logs[0]["rewards/rejected"] == 0
    assert logs[-1]["loss"] < 0.9 * math.log(2)
    assert logs[-1]["rewards/margins"] > 0


def test_the_first_divergence_of_grpo_is_zero_and_then_it_is_not(report):
    logs = report["grpo"]["logs"]
    assert len(logs) == 4
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert logs[0]["clip_ratio/region_mean"] == 0
    assert 0 < logs[-1]["kl"] < math.inf
    assert logs[0]["reward_std"] > 0


def test_a_reward_model_learns_which_answer_is_chosen(report):
    logs = report["reward"]["logs"]
    assert report["reward"]["class"] == "PeriLlamaForSequenceClassification"
    assert len(logs) == 4
    assert logs[-1]["loss"] < logs[0]["loss"] - 0.1
    assert logs[-1]["margin"] > logs[0]["margin"]
