"""`periln-convert --refresh-code`: the code in a checkpoint becomes the package's, and nothing else changes."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, shaken_model, tiny_model
from transformers import AutoModelForCausalLM

import modeling_periln
from modeling_periln import PeriLlamaConfig, PeriLlamaForCausalLM
from modeling_periln.convert import main, to_native
from modeling_periln.refresh import refresh_code
from periln.runkit.checkpoints import _manifest, damage_of

PACKAGE = Path(modeling_periln.__file__).parent
OLD = "# Code of an older version\nraise RuntimeError('old code was run')\n"


def old_checkpoint(folder: Path) -> Path:
    """A checkpoint whose code and auto_map are of another version, with a manifest that is right."""
    shaken_model().save_pretrained(folder)
    for name in ("modeling_periln.py", "placements.py"):
        (folder / name).write_text(OLD)
    (folder / "loss.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "someone/model--modeling_periln.PeriLlamaForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text(json.dumps(_manifest(folder)))
    assert damage_of(folder) is None
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_code_and_auto_map_become_the_packages_and_the_rest_stays(tmp_path, capsys):
    folder = old_checkpoint(tmp_path / "old")
    before, mode = contents(folder), (folder / "config.json").stat().st_mode
    config = json.loads(before["config.json"])
    assert main(["--refresh-code", str(folder)]) == 0
    assert "modeling_periln.py, placements.py, config.json, manifest.json replaced" in capsys.readouterr().out
    after = contents(folder)
    for name in ("modeling_periln.py", "placements.py", "loss.py", "norms.py", "rotary.py", "configuration_periln.py"):
        assert after[name] == (PACKAGE / name).read_bytes()
    assert json.loads(after["config.json"]) == config | {"auto_map": PeriLlamaConfig().auto_map}
    assert (folder / "config.json").stat().st_mode == (folder / "loss.py").stat().st_mode == mode
    for name in ("model.safetensors", "generation_config.json"):
        assert after[name] == before[name]
    assert damage_of(folder) is None and set(json.loads(after["manifest.json"])) == set(after) - {"manifest.json"}
    assert [p.name for p in tmp_path.iterdir()] == ["old"]

    assert main(["--refresh-code", str(folder)]) == 0
    assert "the code is this version already" in capsys.readouterr().out
    assert contents(folder) == after


def test_an_interrupted_refresh_is_completed_by_the_same_command(tmp_path, monkeypatch):
    folder = old_checkpoint(tmp_path / "old")
    replace, done = refresh_code.__globals__["os"].replace, []

    def stopping(source, target):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr("os.replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        refresh_code(folder)
    monkeypatch.undo()
    assert len(done) == 2 and [p.name for p in tmp_path.iterdir()] == ["old"]
    assert refresh_code(folder)
    assert damage_of(folder) is None and refresh_code(folder) == []


def test_a_hard_link_elsewhere_keeps_the_old_code(tmp_path):
    folder = old_checkpoint(tmp_path / "old")
    (tmp_path / "held.py").hardlink_to(folder / "modeling_periln.py")
    refresh_code(folder)
    assert (tmp_path / "held.py").read_text() == OLD


def test_a_checkpoint_with_old_code_loads_with_the_package_and_its_code_is_not_run(tmp_path):
    folder = old_checkpoint(tmp_path / "old")
    ids = random_ids()
    with torch.no_grad():
        loaded, whole = AutoModelForCausalLM.from_pretrained(folder), shaken_model()(ids).logits
        assert type(loaded) is PeriLlamaForCausalLM and torch.equal(loaded(ids).logits, whole)


def test_what_is_not_a_peri_llama_checkpoint_is_refused_and_left_alone(tmp_path, capsys):
    to_native(tiny_model(norm_placement="pre"), "llama").save_pretrained(tmp_path / "llama")
    for name, change in {"wrong": {"norm_placement": "nowhere"}, "list": None}.items():
        tiny_model().save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | change if change else [config]))
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    capsys.readouterr()
    for name, message in {
        "llama": "is 'llama': only the code of peri_llama is refreshed",
        "empty": "is not a model folder: it has no config.json",
        "missing": "is not a model folder: it has no config.json",
        "wrong": "cannot be read by the installed package",
        "list": "holds a list, not an object",
    }.items():
        assert main(["--refresh-code", str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert contents(tmp_path) == before
