"""A run is decided by what its data are, not by where they or its folder lie, nor by how often it is saved."""

import shutil
from pathlib import Path

import pytest
from tiny import make_data, timeless, train, write_recipe

from periln.runkit.errors import run_command
from periln.runkit.folder import RunFolder, weights_hash, write_text
from periln.runkit.recipes import dump_yaml
from periln.scripts import pretrain
from periln.scripts.prepare_data import prepare

ALL = {"keep_last": 9}


def go_on(folder: Path, data: Path, runs: Path, *flags: str, **fields) -> int:
    file = write_recipe(folder, data, **ALL | fields)
    return run_command(pretrain.main, pretrain.parse(["--config", str(file), "--runs", str(runs), *flags]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, RunFolder]:
    """(prepared data, an undisturbed run over them)."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_data(folder)
    return data, train(folder, data, **ALL)


def stopped(whole: tuple[Path, RunFolder], at: Path, name: str = "run") -> RunFolder:
    """A copy of the run under another name and place, as if it had been stopped after its sixth step."""
    run = RunFolder(at / "runs" / name)
    shutil.copytree(whole[1].path, run.path)
    for path in run.checkpoints():
        if int(path.name.removeprefix("step_")) > 6:
            shutil.rmtree(path)
    run.set_status("interrupted", step=6)
    return run


def equal_to_the_bit(run: RunFolder, other: RunFolder) -> bool:
    weights = [weights_hash(r.checkpoints()[-1]) for r in (run, other)]
    layers = [{p.name: p.read_bytes() for p in sorted((r.path / "layers").iterdir())} for r in (run, other)]
    return run.status == "completed" and timeless(run.path) == timeless(other.path) and len(set(weights)) == 1 and (
        layers[0] == layers[1]
    )  # fmt: skip


def test_a_moved_run_over_moved_data_ends_equal_to_the_bit(whole, tmp_path, capsys, monkeypatch):
    run = stopped(whole, tmp_path / "elsewhere", "renamed")
    shutil.copytree(whole[0], tmp_path / "archive" / "tokens")
    monkeypatch.chdir(tmp_path)
    more = {"name": "renamed", "checkpoint_every": 4, "keep_last": 1, "keep_initial": True}
    assert go_on(tmp_path, Path("archive/tokens/"), tmp_path / "elsewhere" / "runs", "--resume", "must", **more) == 0
    assert equal_to_the_bit(run, whole[1])
    said = capsys.readouterr().out
    assert "data: " in said and "'archive/tokens' (only the place differs)" in said
    assert "keep_last: 9 -> 1 (this does not decide the result)" in said
    assert "checkpoint_every: 3 -> 4 (this does not decide the result)" in said
    assert run.recipe["checkpoint_every"] == 4 and run.recipe["data"] == "archive/tokens"
    assert [p.name for p in run.checkpoints()] == ["step_00000012"]


def test_a_run_older_than_some_fields_goes_on_to_the_bit(whole, tmp_path):
    run = stopped(whole, tmp_path)
    recipe = run.recipe
    for name in ("flight", "keep_best", "heldout_every", "document_masking", "stage"):
        del recipe[name]
    del recipe["optimizer"]["z_loss"], recipe["spikes"]["window"]
    write_text(run.path / "recipe.yaml", dump_yaml(recipe))
    assert go_on(tmp_path, whole[0], tmp_path / "runs") == 0
    assert equal_to_the_bit(run, whole[1])
    assert run.recipe == whole[1].recipe


def test_a_change_of_device_is_allowed_and_says_what_it_does(whole, tmp_path, capsys):
    run = stopped(whole, tmp_path)
    assert go_on(tmp_path, whole[0], tmp_path / "runs", device="cpu", micro_batch_size=2) == 0
    said = capsys.readouterr().out
    assert "device: 'auto' -> 'cpu' (the computation is the same, but its bits will differ)" in said
    assert "micro_batch_size: None -> 2 (the computation is the same, but its bits will differ)" in said
    assert run.status == "completed" and len((run.path / "changes.jsonl").read_text().splitlines()) == 2


def test_what_decides_the_result_is_refused_wherever_it_lies(whole, tmp_path, capsys):
    run = stopped(whole, tmp_path)
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    for fields, said in (({"seed": 2}, "seed: 1 -> 2"), ({"layer_stats_every": 4}, "layer_stats_every: 5 -> 4")):
        assert go_on(tmp_path, whole[0], tmp_path / "runs", **fields) == 1
        assert f"belongs to another recipe ({said})" in capsys.readouterr().err
    other = tmp_path / "other"
    (other / "text").mkdir(parents=True)
    for i in range(40):
        (other / "text" / f"{i}.txt").write_text(" ".join(f"{n * i % 71} times the {n}" for n in range(120)))
    prepare(str(other / "text"), other / "data", vocab_size=300, heldout_share=0.05, context=128)
    assert go_on(tmp_path, other / "data", tmp_path / "runs") == 1
    assert "data_fingerprint: " in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


def test_a_refused_command_claims_nothing_and_the_corrected_one_runs(whole, tmp_path, capsys):
    short = Path(shutil.copytree(whole[0], tmp_path / "data"))
    (short / "heldout.jsonl").write_text('{"name": "a", "text": "a"}\n')
    assert go_on(tmp_path, short, tmp_path / "runs", heldout_every=3) == 1
    assert "fewer than one sequence" in capsys.readouterr().err
    run = RunFolder(tmp_path / "runs" / "run")
    assert not (run.path / "recipe.yaml").exists() and not run.began
    run.claim({"stage": "sft", "steps": 3})  # nor does a claim that came to nothing hold anybody up
    assert go_on(tmp_path, whole[0], tmp_path / "runs", "--resume", "never") == 0
    assert equal_to_the_bit(run, whole[1])
