"""Pushing over HTTP to a Hub on loopback: what is sent, what is not, and what happens when it goes wrong."""

import base64
import json
import os
import shutil
from pathlib import Path

import hub_run
import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from modeling_periln.convert import convert
from periln.runkit.checkpoints import _manifest
from periln.runkit.folder import write_json

SENT = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "recipe.yaml", "environment.json"),
    *("summary.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "figures/headroom.png"),
    *hub_run.CODE,
    *("eval/benchmarks-hub.json", "eval/heldout.json", "eval/stability/stability.json"),
    "eval/stability/certificate_00000008.json",
}
LEFT_BEHIND = ("optimizer.bin", "training_args.bin", "pytorch_model.bin", "notes.txt", ".env", "model.safetensors.bak")


def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.token)


def files(hub, repo: str, revision: str = "main") -> set[str]:
    return set(api(hub).list_repo_files(repo, revision=revision)) - {".gitattributes"}


def stored(hub, repo: str, name: str, revision: str = "main") -> Path:
    return hub.server.RequestHandlerClass.store.files("models", repo, revision)[name]


def copy_of(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / run.name)


# What is sent


def test_a_push_sends_the_list_and_nothing_else(hub, run, pushed, tmp_path):
    mine = copy_of(run, tmp_path)
    for name in LEFT_BEHIND:
        (mine / "checkpoints" / "step_00000008" / name).write_text("hf_local /root/secret")
        (mine / name).write_text("hf_local")
    code, out, _ = pushed(mine, "--repo", "acme/list")
    assert code == 0
    assert files(hub, "acme/list") == SENT
    assert f"{hub.url}/acme/list" in out
    assert not api(hub).model_info("acme/list").private
    theirs, ours = (
        load_file(p)
        for p in (stored(hub, "acme/list", "model.safetensors"), run / "checkpoints/step_00000008/model.safetensors")
    )
    assert theirs.keys() == ours.keys() and all(bool((theirs[k] == ours[k]).all()) for k in ours)


def reseal(checkpoint: Path) -> None:
    """Let the manifest know the files as they are now: a checkpoint that differs from it is refused as damaged."""
    write_json(checkpoint / "manifest.json", _manifest(checkpoint))


def test_no_byte_that_was_sent_holds_the_token_or_a_local_path(hub, run, pushed, tmp_path):
    """Of what was received the commits' contents are decoded: they travel as base64."""
    before = len(hub.received)
    mine = copy_of(run, tmp_path)
    config = mine / "checkpoints" / "step_00000008" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"name_or_path": str(tmp_path / "tokenizer")}))
    reseal(config.parent)
    assert pushed(config.parent, "--repo", "acme/clean", "--all-checkpoints")[0] == 0
    bodies = []
    for body in hub.received[before:]:
        if not body.startswith(b'{"key"'):
            bodies.append(body)
            continue
        for operation in map(json.loads, body.splitlines()):
            bodies.append(json.dumps(operation).encode())
            bodies.append(base64.b64decode(operation["value"].get("content", "")))
    assert len(bodies) > 40
    forbidden = [hub.token, "/home/somebody", str(tmp_path), str(Path.home()) + "/", os.getcwd(), "myhost"]
    for body in bodies:
        assert not [word for word in forbidden if word.encode() in body], body[:200]
    assert json.loads(stored(hub, "acme/clean", "eval/benchmarks-hub.json").read_text())["evaluated"]["path"] == (
        "…/step_00000008"
    )


def test_a_switched_off_cache_and_an_older_tokenizers_length_are_put_right(hub, run, pushed, tmp_path):
    checkpoint = shutil.copytree(run / "checkpoints" / "step_00000008", tmp_path / "model")
    (checkpoint / "manifest.json").unlink()
    about = checkpoint / "tokenizer_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"model_max_length": 7}))
    config = json.loads((checkpoint / "config.json").read_text()) | {"use_cache": False, "_name_or_path": "/x/y/z"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert pushed(checkpoint, "--repo", "acme/cache")[0] == 0
    there = json.loads(stored(hub, "acme/cache", "config.json").read_text())
    assert there["use_cache"] is True and "_name_or_path" not in there
    sent = json.loads(stored(hub, "acme/cache", "tokenizer_config.json").read_text())
    assert sent["model_max_length"] == config["max_position_embeddings"] != 7
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is False  # the folder is not touched


def test_every_checkpoint_becomes_a_revision_with_its_own_weights_and_records(hub, run, pushed):
    assert pushed(run, "--repo", "acme/steps", "--all-checkpoints")[0] == 0
    names = {branch.name for branch in api(hub).list_repo_refs("acme/steps").branches}
    assert names == {"main", "step_4", "step_8"}
    weights = {rev: stored(hub, "acme/steps", "model.safetensors", rev).read_bytes() for rev in names}
    assert weights["main"] == weights["step_8"] != weights["step_4"]
    # The benchmarks and the certificate are of step 8: they say nothing of step 4.
    assert files(hub, "acme/steps", "step_8") == SENT
    assert files(hub, "acme/steps", "step_4") == {
        name for name in SENT if not name.startswith("eval/") or name.endswith("stability.json")
    }
    assert "not measured" in stored(hub, "acme/steps", "README.md", "step_4").read_text()


def test_one_step_goes_to_its_own_branch(hub, run, pushed):
    assert pushed(run, "--repo", "acme/one", "--step", "4")[0] == 0
    assert files(hub, "acme/one") == set()
    assert "model.safetensors" in files(hub, "acme/one", "step_4")
    code, _, err = pushed(run, "--repo", "acme/one", "--step", "5")
    assert code != 0 and "no checkpoint of step 5 (it has: 4, 8)" in err


def test_the_card_on_the_hub_is_read_by_the_client(hub, run, pushed):
    assert pushed(run, "--repo", "acme/card", "--datasets", "acme/text")[0] == 0
    card = ModelCard(stored(hub, "acme/card", "README.md").read_text())
    assert card.data.pipeline_tag == "text-generation" and card.data.datasets == ["acme/text"]
    assert {r.dataset_name for r in card.data.eval_results} == {"ARC-Easy", "HellaSwag", "PIQA", "SIQA", "Winogrande"}
    assert 'from_pretrained("acme/card", trust_remote_code=True)' in card.text


def test_of_a_fine_tuning_the_chosen_epoch_is_sent(run, pushed, tmp_path):
    tuned = copy_of(run, tmp_path) / "sft"
    tuned.mkdir()
    (tuned / "recipe.yaml").write_text("stage: sft\nseed: 1\n")
    shutil.copytree(run / "checkpoints" / "step_00000004", tuned / "checkpoints" / "step_00000002")
    shutil.copytree(run / "checkpoints" / "step_00000008", tuned / "checkpoints" / "step_00000004")
    assert "from step_00000004" in pushed(tuned, "--repo", "acme/tuned", "--dry-run")[1]
    (tuned / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/step_00000002", "step": 2}))
    assert "from step_00000002" in pushed(tuned, "--repo", "acme/tuned", "--dry-run")[1]


def test_an_export_is_sent_with_its_proof_and_without_code(hub, run, pushed, tmp_path):
    convert(run / "checkpoints" / "step_00000008", tmp_path / "export", "hyperclovax", text="none")
    assert pushed(tmp_path / "export", "--repo", "acme/export")[0] == 0
    names = files(hub, "acme/export")
    assert "conversion.json" in names and "tokenizer.json" in names and not [n for n in names if n.endswith(".py")]
    assert "architecture HyperCLOVAXForCausalLM" in stored(hub, "acme/export", "README.md").read_text()


def test_an_adapter_of_a_model_that_is_only_here_is_refused(hub, run, pushed, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({"lora": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    config = {"base_model_name_or_path": str(run / "checkpoints" / "step_00000008"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    code, _, err = pushed(adapter, "--repo", "acme/adapter")
    assert code == 2 and "merge it" in err
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "acme/base"}))
    assert pushed(adapter, "--repo", "acme/adapter")[0] == 0
    assert files(hub, "acme/adapter") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


# Again


def test_what_is_unchanged_is_not_sent_again(hub, run, pushed, tmp_path):
    mine = copy_of(run, tmp_path)
    assert pushed(mine, "--repo", "acme/again")[0] == 0
    commits, received = len(api(hub).list_repo_commits("acme/again")), len(hub.received)
    code, out, _ = pushed(mine, "--repo", "acme/again")
    assert code == 0 and "nothing to send" in out
    assert len(hub.received) == received
    assert len(api(hub).list_repo_commits("acme/again")) == commits
    hub_run.write_scores(mine, tasks=("openbookqa",), file="more")
    code, out, _ = pushed(mine, "--repo", "acme/again")
    assert code == 0 and f"2 files sent, {len(SENT) - 1} unchanged" in out  # the new scores and the card
    assert len(hub.received) == received + 1  # one commit; the weights were not sent
    assert "eval/benchmarks-more.json" in files(hub, "acme/again")


def test_files_of_an_earlier_push_go_and_others_stay(hub, run, pushed, tmp_path):
    mine = copy_of(run, tmp_path)
    hub_run.write_scores(mine, file="old")
    assert pushed(mine, "--repo", "acme/stale")[0] == 0
    api(hub).upload_file(path_or_fileobj=b"mine", path_in_repo="LICENSE", repo_id="acme/stale")
    (mine / "eval" / "benchmarks-old.json").unlink()
    code, out, _ = pushed(mine, "--repo", "acme/stale")
    assert code == 0 and "eval/benchmarks-old.json  deleted" in out
    assert files(hub, "acme/stale") == SENT | {"LICENSE"}


def test_a_push_that_was_cut_in_an_upload_goes_on(hub, pushed, tmp_path, monkeypatch):
    """The second of three shards is cut again and again; pushed once more, the first is not sent a second time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # the client's own retries
    model = tmp_path / "model"
    hub_run.model().save_pretrained(model, max_shard_size="30KB")
    shards = sorted(p.stat().st_size for p in model.glob("model-*.safetensors"))
    assert len(shards) >= 3
    before = len(hub.received)
    hub.faults.update({"pass": 1, "cuts": 6, "after": 1000})
    code, _, err = pushed(model, "--repo", "acme/cut")
    assert code == 1 and "was interrupted" in err and "the same command" in err
    assert hub.faults["cuts"] == 0 and len(err.splitlines()[-1].split(". ")) == 1
    assert files(hub, "acme/cut") == set()  # nothing of half a push is to be seen
    first = hub.received[before:]
    assert len(first) == 1
    code, _, _ = pushed(model, "--repo", "acme/cut")
    assert code == 0
    sent = [body for body in hub.received[before:] if not body.startswith(b'{"key"')]
    assert sorted(map(len, sent)) == shards  # each shard once, over both pushes
    assert {n for n in files(hub, "acme/cut") if n.endswith(".safetensors")} == {
        p.name for p in model.glob("*.safetensors")
    }


def test_a_cut_that_ends_is_not_even_noticed(hub, pushed, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub_run.model(seed=5).save_pretrained(tmp_path / "model")
    hub.faults.update({"pass": 0, "cuts": 1, "after": 1000})
    assert pushed(tmp_path / "model", "--repo", "acme/blink")[0] == 0
    assert "model.safetensors" in files(hub, "acme/blink")


# Refused


def test_a_dry_run_lists_every_file_with_its_size_and_needs_no_network(run, pushed, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.delenv("HF_TOKEN", raising=False)
    code, out, _ = pushed(run, "--repo", "acme/dry", "--dry-run", "--all-checkpoints")
    assert code == 0 and "nothing was sent" in out
    size = (run / "checkpoints" / "step_00000008" / "model.safetensors").stat().st_size
    for name in SENT:
        assert any(line.split()[:1] == [name] and line.endswith(" B") for line in out.splitlines()), name
    assert f"{size:,} B" in out and "acme/dry at step_4" in out


def test_a_diverged_run_needs_force(hub, pushed, tmp_path):
    run = hub_run.write_run(tmp_path, seed=2, status="diverged")
    code, _, err = pushed(run, "--repo", "acme/diverged")
    assert code == 1 and "diverged (the loss was not finite for 10 steps in a row)" in err and "--force" in err
    assert pushed(run / "checkpoints" / "step_00000004", "--repo", "acme/diverged")[0] == 1
    assert not api(hub).repo_exists("acme/diverged")
    assert pushed(run, "--repo", "acme/diverged", "--force")[0] == 0
    assert "**This run diverged.**" in stored(hub, "acme/diverged", "README.md").read_text()


def test_a_wrong_token_is_one_sentence_that_does_not_show_it(hub, run, pushed, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_and_secret")
    code, out, err = pushed(run, "--repo", "acme/token")
    assert code == 1 and "does not accept the token (401)" in err and len(err.strip().splitlines()) == 1
    assert "hf_wrong_and_secret" not in out + err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("periln.scripts.push.command.get_token", lambda: None)
    code, _, err = pushed(run, "--repo", "acme/token")
    assert code == 1 and "no access token" in err


def test_where_nobody_answers_it_says_so(run, pushed, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = pushed(run, "--repo", "acme/unreachable")
    assert code == 1 and "was interrupted" in err and len(err.strip().splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = pushed(run, "--repo", "acme/unreachable")
    assert code == 1 and "switched off (HF_HUB_OFFLINE)" in err and len(err.strip().splitlines()) == 1


def test_a_token_in_a_record_stops_the_push_before_anything_is_sent(hub, run, pushed, tmp_path):
    mine = copy_of(run, tmp_path)
    requests = len(hub.requests)
    (mine / "environment.json").write_text(json.dumps({"note": f"login with {hub.token}"}))
    code, _, err = pushed(mine, "--repo", "acme/leak")
    assert code == 1 and "environment.json holds an access token" in err and hub.token not in err
    assert len(hub.requests) == requests


@pytest.mark.parametrize("where", ["weights", "code", "figure", "template"])
def test_a_local_path_in_a_file_that_is_sent_as_it_is_stops_the_push(where, hub, run, pushed, tmp_path):
    mine = copy_of(run, tmp_path)
    checkpoint = mine / "checkpoints" / "step_00000008"
    file = {
        "weights": checkpoint / "model.safetensors",
        "code": checkpoint / "loss.py",
        "figure": mine / "figures" / "headroom.png",
        "template": checkpoint / "chat_template.jinja",
    }[where]
    file.write_bytes(file.read_bytes() + str(mine).encode())
    reseal(checkpoint)
    code, _, err = pushed(checkpoint, "--repo", "acme/path")
    assert code == 1 and f"{file.name} holds the local path" in err


def test_a_path_of_any_machine_in_the_weights_metadata_stops_the_push(run, pushed, tmp_path):
    model = shutil.copytree(run / "checkpoints" / "step_00000008", tmp_path / "model")
    (model / "manifest.json").unlink()
    weights = model / "model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt", "from": "/lustre/somebody/x.bin"})
    code, _, err = pushed(model, "--repo", "acme/metadata")
    assert code == 1 and "model.safetensors holds the path /lustre/somebody/x.bin" in err
    weights.write_bytes(b"no weights")
    code, _, err = pushed(model, "--repo", "acme/metadata")
    assert code == 1 and "model.safetensors is not a safetensors file" in err


def test_an_existing_public_repository_is_not_taken_for_a_private_one(hub, run, pushed):
    assert pushed(run, "--repo", "acme/secret", "--private")[0] == 0
    assert api(hub).model_info("acme/secret").private
    assert pushed(run, "--repo", "acme/secret", "--private")[0] == 0
    assert pushed(run, "--repo", "acme/open")[0] == 0
    code, _, err = pushed(run, "--repo", "acme/open", "--private")
    assert code == 1 and "exists and is public" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repo", "no-owner"], "must be ORG/NAME"),
        (["--repo", "a/b/c"], "cannot name a repository"),
        (["--repo", "acme/x", "--revision", "a b"], "--revision 'a b' is not a name for a branch"),
        (["--repo", "acme/x", "--revision", "v1", "--all-checkpoints"], "named by their steps"),
    ],
)
def test_mistakes_are_found_before_any_work(words, said, run, pushed):
    code, _, err = pushed(run, *words)
    assert code == 2 and said in err


def test_folders_that_are_no_whole_model_are_refused_by_name(run, pushed, tmp_path):
    code, _, err = pushed(tmp_path / "nowhere", "--repo", "acme/x")
    assert code == 2 and "nowhere does not exist" in err
    mine = shutil.copytree(run / "checkpoints" / "step_00000004", tmp_path / "model")
    with open(mine / "model.safetensors", "ab") as file:
        file.write(b"x")
    code, _, err = pushed(mine, "--repo", "acme/x")
    assert code == 1 and "damaged" in err
    (mine / "manifest.json").unlink()
    (mine / "norms.py").unlink()
    code, _, err = pushed(mine, "--repo", "acme/x")
    assert code == 1 and "norms.py" in err
    (mine / "model.safetensors").rename(mine / "pytorch_model.bin")
    code, _, err = pushed(mine, "--repo", "acme/x")
    assert code == 2 and "nothing but safetensors is sent" in err


def test_a_missing_repository_is_named_when_it_is_loaded(hub):
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError):
        api(hub).list_repo_files("acme/nowhere")
