"""A checkpoint's own code decodes with a cache what it decodes without one, for every placement, with these versions.

The process that loads it cannot import the package: what runs is what a user without the package runs.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from tiny_models import random_ids, shaken_model

from modeling_periln import PLACEMENT_NAMES
from modeling_periln.configuration_periln import AUTO_MAP

TOKENS = 12
WITHOUT_PACKAGE = """
import json, sys, warnings
from pathlib import Path

sys.modules["modeling_periln"] = None  # importing it raises ModuleNotFoundError, even where it is installed
warnings.simplefilter("always")
import torch
from transformers import AutoModelForCausalLM

root, ids = Path(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
found = {}
for folder in sorted(root.iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found[folder.name] = {
        str(use_cache): model.generate(
            ids, max_new_tokens=int(sys.argv[3]), do_sample=False, use_cache=use_cache
        ).tolist()
        for use_cache in (True, False)
    }
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory) -> tuple[dict, str]:
    """The tokens of each placement with and without a cache, and what the process wrote to stderr."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in PLACEMENT_NAMES:
        shaken_model(norm_placement=name).save_pretrained(root / name)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP")}
    environment |= {"HF_HOME": str(elsewhere / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(root), json.dumps(random_ids().tolist()), str(TOKENS)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_PACKAGE, *arguments],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("FOUND")[2]), done.stderr


@torch.no_grad()
def by_hand(model, ids: torch.Tensor) -> torch.Tensor:
    """Greedy tokens of full forward passes: neither a cache nor `generate` has a part in them."""
    for _ in range(TOKENS):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENT_NAMES)
def test_greedy_text_is_the_same_with_and_without_a_cache_and_by_hand(name, remote):
    model, ids = shaken_model(norm_placement=name), random_ids()
    model.generation_config.eos_token_id = None
    expected = by_hand(model, ids).tolist()
    assert remote[0][name] == {"True": expected, "False": expected}
    for use_cache in (True, False):
        assert model.generate(ids, max_new_tokens=TOKENS, do_sample=False, use_cache=use_cache).tolist() == expected


@pytest.mark.slow
def test_no_warning_of_deprecation_comes_from_the_checkpoints_code(remote):
    lines = [line for line in remote[1].splitlines() if "deprecated" in line.lower()]
    files = tuple({f"{value.split('.')[0]}.py" for value in AUTO_MAP.values()})
    assert not [line for line in lines if any(file in line for file in files)], transformers.__version__
