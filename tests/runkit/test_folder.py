"""The run folder: written whole or not at all, claimed by one recipe, held by one process."""

import json
import os
import subprocess
import sys
import time

import pytest

from periln.runkit.checkpoints import damage_of
from periln.runkit.errors import UserError
from periln.runkit.folder import RunFolder, read_json, write_folder, write_json, write_text


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"x": float("nan")})
    assert read_json(file) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "checkpoint"
    with pytest.raises(ZeroDivisionError), write_folder(target) as folder:
        (folder / str(1 // 0)).write_text("x")
    assert os.listdir(tmp_path) == []
    with write_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("I/O: No space left on device")])
def test_a_full_disk_is_one_sentence_with_the_path_and_loses_nothing(tmp_path, monkeypatch, error):
    file = tmp_path / "a.json"
    write_json(file, {"x": 1})

    def full(fd):
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space on the disk: .*a\.json could not be written"):
        write_json(file, {"x": 2})
    with (
        pytest.raises(UserError, match=r"no space on the disk: .*checkpoint could"),
        write_folder(tmp_path / "checkpoint"),
    ):
        pass
    assert read_json(file) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        read_json(tmp_path / "summary.json")


def test_a_folder_belongs_to_one_recipe_and_the_differing_fields_are_named(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim({"steps": 5, "optimizer": {"learning_rate": 0.002}})
    run.claim({"steps": 5, "optimizer": {"learning_rate": 0.002}})
    write_text(run.metrics_path, '{"step": 0}\n')
    run.claim({"steps": 5, "optimizer": {"learning_rate": 0.002}})
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.002 -> 0\.1"):
        run.claim({"steps": 5, "optimizer": {"learning_rate": 0.1}})
    assert run.recipe["optimizer"]["learning_rate"] == 0.002


@pytest.mark.parametrize("left", [{}, {"summary.json": '{"status": "failed"}', "data.json": "{}", "metrics.jsonl": ""}])
def test_what_a_refused_command_left_is_taken_over(tmp_path, left, capsys):
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.claim({"stage": "pretrain", "steps": 5})
    for name, text in left.items():
        (run.path / name).write_text(text)
    (run.path / "checkpoints").mkdir()
    assert run.claim({"stage": "sft", "steps": 6}) == {"stage": "sft", "steps": 6}
    assert run.recipe == {"stage": "sft", "steps": 6} and run.summary == {}
    assert "held another recipe, of a run that never began" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '{"step": 0}\n'),
        ("checkpoints/step_00000000/model.safetensors", "x"),
        ("notes.txt", "precious"),
        ("summary.json", '{"status": "diverged"}'),
        ("recipe.yaml", "# mine, with a comment\nsteps: 5\n"),
    ],
)
def test_what_is_worth_keeping_is_not_taken_over(tmp_path, name, text):
    run = RunFolder(tmp_path / "run")
    run.claim({"steps": 5})
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).write_text(text)
    before = (run.path / "recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"belongs to another recipe \(steps: 5 -> 6\)"):
        run.claim({"steps": 6})
    assert (run.path / "recipe.yaml").read_text() == before


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    for name in ("thesis.tex", "data.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("precious")
        with pytest.raises(UserError, match=r"holds files but no recipe\.yaml"):
            RunFolder(folder).claim({"steps": 1})
        assert os.listdir(folder) == [name]


def test_records_after_the_checkpoint_and_a_cut_last_line_are_dropped(tmp_path):
    run = RunFolder(tmp_path)
    write_text(run.metrics_path, "".join(json.dumps({"step": s}) + "\n" for s in range(5)) + '{"step": 5, "lo')
    assert [r["step"] for r in run.metrics()] == [0, 1, 2, 3, 4]
    run.truncate_metrics(3)
    assert run.metrics_path.read_text().count("\n") == 3


def test_an_unknown_status_is_our_own_mistake(tmp_path):
    with pytest.raises(ValueError, match="status='done'"):
        RunFolder(tmp_path).set_status("done")


HOLD = """
import sys, time
from periln.runkit.folder import RunFolder
with RunFolder(sys.argv[1]).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_lets_go(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {holder.pid}"), RunFolder(tmp_path).locked():
            pass
        holder.kill()
        holder.wait()
        start = time.monotonic()
        with RunFolder(tmp_path).locked(wait_seconds=5):
            assert time.monotonic() - start < 5
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("manifest", ['{"a": {"bites": 1, "sha256": "0"}}', '{"a": 3}', "[]", "{"])
def test_a_damaged_manifest_is_damage_and_no_crash(tmp_path, manifest):
    (tmp_path / "a").write_text("x")
    (tmp_path / "manifest.json").write_text(manifest)
    assert "manifest.json" in damage_of(tmp_path)
