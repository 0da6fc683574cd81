"""What was pushed loads where only torch and transformers are: a second virtual environment, over HTTP.

And where this package is installed, without the repository's code; the logits are equal to the bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hub_run
import pytest
import second_environment
import torch
from safetensors.torch import load_file

from periln.runkit.errors import run_command
from periln.scripts.arguments.push import parse
from periln.scripts.push import command as push

pytestmark = pytest.mark.slow
ROOT, TESTS = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
REPO = "acme/without-us"
PLAIN = ("acme/plain", "acme/again", "acme/trained")  # see plain_pushes.py
IDS = [[3, 9, 10, 11, 4, 7]]


def process(words: list, hub, folder: Path, **more: str) -> str:
    """Run something elsewhere, with its own Hub cache; what it printed."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSTARTUP", "HF_TOKEN")}
    env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    env |= {"OMP_NUM_THREADS": "1"} | more
    options = {"capture_output": True, "text": True, "timeout": 300, "check": False, "stdin": subprocess.DEVNULL}
    done = subprocess.run(words, cwd=folder, env=env, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def load(python: Path, kind: str, hub, folder: Path, others: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """Run loads.py in an environment: what it said, and the tensors that it computed."""
    words = [REPO, folder / f"{kind}.safetensors", kind]
    words += [json.dumps(x) for x in (second_environment.ABSENT, IDS, others)]
    more = {"PYTHONPATH": str(ROOT)} if kind == "installed" else {}
    out = process([python, "-P", TESTS / "loads.py", *words], hub, folder, **more)
    return json.loads(out.rpartition("REPORT")[2]), load_file(folder / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def both(hub, run, tmp_path_factory):
    """What our command and the libraries' methods pushed, loaded in the second environment and in this one."""
    assert run_command(push.main, parse([str(run), "--repo", REPO, "--all-checkpoints"])) == 0
    work = tmp_path_factory.mktemp("plain")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process([sys.executable, TESTS / "plain_pushes.py", work], hub, work, PYTHONPATH=path, HF_TOKEN=hub.token)
    elsewhere, here = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("here")
    return {
        "remote": load(second_environment.create(elsewhere / "venv"), "remote", hub, elsewhere, PLAIN),
        "installed": load(Path(sys.executable), "installed", hub, here),
    }


@pytest.fixture(scope="module")
def remote(both):
    return both["remote"]


@pytest.fixture(scope="module")
def here():
    return hub_run.model(seed=11)


def test_nothing_of_ours_or_of_the_stages_can_be_imported_there(remote):
    assert remote[0]["present"] == [] and remote[0]["imported"] == []


@torch.no_grad()
def test_it_generates_the_same_tokens_there(remote, here):
    said, tensors = remote
    assert said["class"] == ["PeriLlamaForCausalLM", "transformers_modules", "torch.float32"]
    ids = torch.tensor(IDS)
    assert torch.equal(tensors["logits"], here(ids).logits)
    assert torch.equal(tensors["tokens"], here.generate(ids, max_new_tokens=8, do_sample=False))
    assert torch.equal(tensors["hidden"], here.model(ids).last_hidden_state)


@torch.no_grad()
def test_a_revision_is_another_checkpoint(remote):
    early = hub_run.model(seed=10)(torch.tensor(IDS)).logits
    assert torch.equal(remote[1]["early_logits"], early)
    assert not torch.equal(remote[1]["early_logits"], remote[1]["logits"])


@torch.no_grad()
def test_the_dtype_is_the_one_that_was_asked_for(remote, here):
    half = remote[1]["half_logits"]
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, hub_run.model(seed=11).bfloat16()(torch.tensor(IDS)).logits)


def test_a_device_map_asks_for_accelerate_and_works_with_it(both):
    there, here = both["remote"], both["installed"]
    assert "accelerate" in there[0]["device_map"] and "mapped_logits" not in there[1]
    assert here[0]["device_map"] is None
    assert torch.equal(here[1]["mapped_logits"], here[1]["logits"])


def test_the_other_classes_and_the_pipeline_work_there(remote):
    said = remote[0]
    assert said["labels"] == [1, 3]
    assert said["pipeline"].replace(" ", "") == said["by_hand"].replace(" ", "")  # it decodes the two halves apart
    assert len(said["pipeline"]) > len("the function returns a value")
    assert said["chat"] == "<|user|> how do i boil the egg <|end|><|endoftext|>"
    assert said["use_cache"] is True


def test_the_installed_package_needs_no_trust_and_gives_the_same_bits(both):
    there, here = both["remote"], both["installed"]
    assert here[0]["class"][1] == "modeling_periln" and there[0]["class"][1] == "transformers_modules"
    for name in ("logits", "tokens", "early_logits", "half_logits", "hidden"):
        assert torch.equal(there[1][name], here[1][name]), name
    assert there[0]["pipeline"] == here[0]["pipeline"]


def test_what_is_missing_is_named(remote):
    said = remote[0]
    assert "trust_remote_code" in said["no trust"]
    assert "acme/nowhere" in said["no repository"]
    assert "step_5" in said["no revision"]


@pytest.mark.parametrize("repo", PLAIN)
@torch.no_grad()
def test_the_libraries_own_push_methods_give_a_repository_that_loads(repo, remote, hub, here):
    """Of the model and the tokenizer; after a load and a re-save; of the Trainer."""
    there = hub.server.RequestHandlerClass.store.files("models", repo)
    assert set(there) >= hub_run.CODE | {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    auto_map = json.loads(there["config.json"].read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_periln.PeriLlamaModel"
    assert not [name for name in auto_map.values() if "--" in name]
    assert torch.equal(remote[1][repo], here(torch.tensor(IDS)).logits)
