"""The check for a GPU, at toy size on a CPU: every section passes, a planted fault fails, a deadline ends."""

import json
import re

import pytest
import torch
from tiny import ROOT, run

from periln.runkit.errors import UsageError, UserError
from periln.scripts.arguments.gpu_check import SECONDS, SECTIONS, check, parse
from periln.scripts.gpu_check import arithmetic, command, kernels, overflow, speed
from periln.scripts.gpu_check.notes import Notes, Skipped, status_of
from periln.scripts.gpu_check.place import Place
from periln.scripts.gpu_check.sections import FUNCTIONS

KEYS = {"status", "reason", "seconds", "deadline_seconds", "checks", "measured", "left_out"}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, torch.device("cpu"))


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path / "notes.json", 600)


def wrong(notes: Notes) -> list[str]:
    return [one["name"] for one in notes.found["checks"] if not one["holds"]]


def test_the_deadlines_leave_time_to_start():
    assert sum(SECTIONS.values()) <= SECONDS - 20
    assert set(SECTIONS) == set(FUNCTIONS)


def test_notes_are_on_the_disk_after_every_entry(tmp_path):
    notes = Notes(tmp_path / "notes.json", 60)
    notes.check("a", True, float("inf"), "anything")
    notes.measure("b", {1: [float("nan"), 2.0]})
    found = json.loads((tmp_path / "notes.json").read_text())
    assert found["checks"][0]["value"] == "inf"
    assert found["measured"] == {"b": {"1": ["nan", 2.0]}}
    assert status_of(found) == "pass"
    assert not notes.has_time("long", 100)
    assert notes.found["left_out"] == ["long"]
    notes.check("c", False, 1, "2")
    assert status_of(notes.found) == "fail"


def test_a_section_that_cannot_be_done_is_skipped_and_an_error_fails(tmp_path, monkeypatch):
    def skipping(place, notes):
        raise Skipped("no such thing here")

    def failing(place, notes):
        notes.measure("before", 1)
        raise RuntimeError("broken")

    monkeypatch.setitem(FUNCTIONS, "device", skipping)
    command.run_section("device", tmp_path, "cpu", 10)
    found = json.loads(command.notes_file(tmp_path, "device").read_text())
    assert (status_of(found), found["skipped"]) == ("skipped", "no such thing here")
    monkeypatch.setitem(FUNCTIONS, "device", failing)
    with pytest.raises(RuntimeError):
        command.run_section("device", tmp_path, "cpu", 10)
    found = json.loads(command.notes_file(tmp_path, "device").read_text())
    assert (status_of(found), found["error"], found["measured"]["before"]) == ("fail", "RuntimeError: broken", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sections", "sped"], r"--sections 'sped' is not a section \(did you mean 'speed'\?\)"),
        (["--seconds", "0"], "--seconds must be above 0, not 0"),
    ],
)
def test_a_mistake_is_refused(tmp_path, words, message):
    with pytest.raises(UsageError, match=message):
        check(parse(["--out", str(tmp_path), *words]))


def test_a_result_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "gpu_check.json").write_text("{}")
    with pytest.raises(UserError, match="gpu_check.json exists: give another --out"):
        check(parse(["--out", str(tmp_path)]))


def test_no_setting_of_the_accelerator_is_touched():
    text = "".join(file.read_text() for file in (ROOT / "scripts" / "gpu_check").glob("*.py"))
    assert not re.search(
        r"nvidia.smi|nvml|rocm.smi|\bmig\b|device_reset|memory_fraction|persistence", text, re.IGNORECASE
    )


def test_kernels_have_kinds():
    assert kernels.kind_of("sm90_xmma_gemm_f16f16_f16f32") == "products"
    assert kernels.kind_of("cudnn_generated_fort_native_sdpa_sm90_flash_fprop") == "attention"
    assert kernels.kind_of("triton_poi_fused_add_mul_3") == "fused by the compiler"
    assert kernels.kind_of("aten::_log_softmax") == "softmax and loss"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "quick_compiler")
@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_passes_at_toy_size(place, notes, name):
    FUNCTIONS[name](place, notes)
    assert notes.found["checks"] and not wrong(notes)
    assert not notes.found["left_out"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "quick_compiler")
def test_what_is_wrong_fails(place, notes, monkeypatch):
    plain = place.trainer

    def reads_in_every_layer(self, recipe):
        trainer = plain(recipe)
        trainer.model.model.layers[0].register_forward_hook(lambda m, args, out: bool(out.isfinite().all()) and None)
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr(Place, "trainer", reads_in_every_layer)
        arithmetic.check_host_waits(place, notes)
    assert wrong(notes) == ["host waits with 1 and 12 micro batches"]
    monkeypatch.setattr(overflow, "plant", lambda trainer: None)
    overflow.check_overflow(place, notes)
    assert "eager: the skip and its module" in wrong(notes)
    assert "compiled: the sum that is recorded" in wrong(notes)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_accelerate", "quick_compiler")
def test_what_there_is_no_time_for_is_named(place, tmp_path):
    notes = Notes(tmp_path / "notes.json", 0.0)
    speed.check_speed(place, notes)
    assert notes.found["measured"]["peri"]["steps"] == 1
    assert {"eager", "bf16", "loss", "memory"} <= set(notes.found["left_out"])


@pytest.mark.slow
def test_the_command_writes_one_json_and_keeps_what_a_late_section_had(tmp_path):
    words = ("--device", "cpu", "--sections", "device", "--threads", 1, "--seconds", 3600)  # a busy machine is slow
    done = run("scripts.gpu_check", "--out", tmp_path / "a", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "a" / "gpu_check.json").read_text())
    assert (found["device"], found["size"]) == ("cpu", "toy")
    section = found["sections"]["device"]
    assert set(section) == KEYS and section["status"] == "pass"
    assert section["measured"]["product_flops_fp32"] > 0
    done = run(
        "scripts.gpu_check", "--out", tmp_path / "b", "--device", "cpu", "--sections", "device", "--seconds", "2"
    )
    assert done.returncode == 1
    section = json.loads((tmp_path / "b" / "gpu_check.json").read_text())["sections"]["device"]
    assert (section["status"], section["reason"]) == ("fail", "it ran past its 0 seconds")
