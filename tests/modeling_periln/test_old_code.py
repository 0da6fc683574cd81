"""A checkpoint with the code of before Transformers renamed the cache loads with the package, and decodes right.

The old code is read from the history of the repository: where there is none (an unpacked archive), the test skips.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import random_ids, shaken_model

ROOT = Path(__file__).parents[2]
OLD = "0f0e11a"  # the last commit whose model knows `past_key_values` alone
FILES = ("configuration_periln.py", "modeling_periln.py", "norms.py", "placements.py", "loss.py", "rotary.py")
LOAD = """
import json, sys
import torch
import modeling_periln
from transformers import AutoModelForCausalLM

found = []
for trust in (False, True):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust).eval()
    assert type(model).__module__.startswith("modeling_periln."), type(model).__module__
    ids = torch.tensor(json.loads(sys.argv[2]))
    for use_cache in (True, False):
        found.append(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use_cache).tolist())
print("FOUND" + json.dumps(found))
"""


def old_file(name: str) -> str:
    command = ["git", "-C", str(ROOT), "show", f"{OLD}:modeling_periln/{name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed: the old code cannot be read")
    if done.returncode:
        pytest.skip(f"the history of the repository, with its commit {OLD}, is not here")
    return done.stdout


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """As the old code saved it: its files and its fields of the configuration."""
    model = shaken_model(norm_placement="peri", qk_norm="head")
    folder = tmp_path / "old"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(old_file(name))
    config = model.config.to_dict()
    config.pop("norm_gain")  # younger than the code
    config["architectures"] = ["PeriLlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.mark.slow
def test_a_checkpoint_with_the_old_code_loads_with_the_package_and_generates_right(checkpoint):
    assert "past_key_values" in (checkpoint / "modeling_periln.py").read_text()
    assert not (checkpoint / "arguments.py").exists()
    model, ids = shaken_model(norm_placement="peri", qk_norm="head"), random_ids(2, 5)
    for _ in range(8):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(checkpoint), json.dumps(random_ids(2, 5).tolist())],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.rpartition("FOUND")[2]) == [ids.tolist()] * 4
