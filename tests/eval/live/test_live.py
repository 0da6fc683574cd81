"""Tests of the live page: it follows run folders while they are written, on this machine alone, and writes nothing."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from browser import CHROMIUM, look
from synthetic_bench import write_any
from synthetic_runs import write_run

from periln.eval.arguments.live import check, parse
from periln.eval.live.command import server_of
from periln.eval.live.followed import Followed
from periln.eval.live.state import Watch
from periln.runkit.errors import UsageError, UserError

ROOT = Path(__file__).resolve().parents[3]


def state(root: Path) -> dict:
    return json.loads(Watch(root).state())


def row(root: Path, name: str) -> dict:
    return next(run for run in state(root)["runs"] if run["name"] == name)


def running(run: Path, pid: int | None = None, **more) -> None:
    who = {"host": socket.gethostname(), "pid": os.getpid() if pid is None else pid}
    (run / "summary.json").write_text(json.dumps({"status": "running", "step": 0} | who | more))


def metrics(run: Path, count: int, seconds: float = 2.0) -> None:
    """The first `count` records of a run, each with the time that its step took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:count]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x | {"step_seconds": seconds}) + "\n" for x in lines))


@contextmanager
def served(root: Path, watch: Watch | None = None) -> Iterator[str]:
    with server_of(watch or Watch(root), 0, 0.3) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


# --- what it reads -------------------------------------------------------------------------------------------


def test_a_running_run_has_its_numbers_and_the_time_that_is_left(tmp_path):
    run = write_run(tmp_path, "pre")
    metrics(run, 80)
    running(run)
    found = row(tmp_path, "pre_lr0.002_seed1")
    assert (found["status"], found["step"], found["steps"]) == ("running", 80, 200)
    assert found["left"] == pytest.approx(120 * 2.0) and found["seconds"] == 2.0
    assert found["skips"] == {"probe": 2}
    assert found["bits"] == pytest.approx(9.8, abs=0.1)
    assert state(tmp_path)["left"] == found["left"] and state(tmp_path)["pause"] > 0


def test_a_run_whose_process_is_gone_is_said_to_have_stopped(tmp_path):
    run = write_run(tmp_path, "pre")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running(run, pid=ended.pid)
    found = row(tmp_path, "pre_lr0.002_seed1")
    assert found["status"] == "stopped" and found["left"] is None
    running(run, pid=ended.pid, host="elsewhere")  # of another machine nothing is known
    assert row(tmp_path, "pre_lr0.002_seed1")["status"] == "running"


def test_only_what_is_new_is_read_and_half_a_line_waits(tmp_path):
    run = write_run(tmp_path, "pre")
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open(run / "metrics.jsonl", "w") as file:
        file.writelines([*text[:10], text[10][:20]])
    followed = Followed(run)
    followed.refresh()
    assert followed.step == 10
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines([text[10][20:], *text[11:30]])
    followed.refresh()
    assert [record["step"] for record in followed.records] == list(range(30))


def test_a_resume_that_cuts_the_records_is_followed(tmp_path):
    run = write_run(tmp_path, "pre")
    followed = Followed(run)
    followed.refresh()
    assert followed.step == 200
    followed.folder.truncate_metrics(150)
    followed.refresh()
    assert followed.step == 150


def test_runs_that_begin_later_and_cells_that_wait_are_listed(tmp_path):
    assert state(tmp_path)["runs"] == []
    (tmp_path / "recipes").mkdir()
    for name in ("a", "b"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text("stage: pretrain\n")
    watch = Watch(tmp_path)
    watch.state()
    write_any(tmp_path, "a")
    watch._made = (float("-inf"), "")  # as if a second had passed
    assert [(run["name"], run["status"]) for run in json.loads(watch.state())["runs"]] == [
        ("a", "completed"),
        ("b", "waiting"),
    ]


def test_the_cells_of_a_study_are_listed_once_and_those_that_run_come_first(tmp_path):
    for name, status in (("a", "completed"), ("b", "running"), ("c", "completed")):
        write_any(tmp_path / "cells", name, status=status)
    (tmp_path / "recipes").mkdir()
    for name in "abcd":
        (tmp_path / "recipes" / f"{name}.yaml").write_text("stage: pretrain\n")
    assert [run["name"] for run in state(tmp_path)["runs"]] == ["cells/b", "cells/a", "cells/c", "d"]


def test_many_tables_of_layers_are_read_in_several_answers(tmp_path, monkeypatch):
    for name in ("a", "b"):
        write_any(tmp_path, name, growth=40.0)
    watch = Watch(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("periln.eval.live.state.READING_SECONDS", -1.0)  # as if it had passed
        first = json.loads(watch.state())
    assert first["behind"] == 2 and "headroom" not in first["plots"] and first["plots"]["curves"]["lines"]
    assert [run["bits"] for run in first["runs"]] == [None, None]  # and not those of a part
    watch._made = (float("-inf"), "")
    then = json.loads(watch.state())
    assert then["behind"] == 0 and len(then["plots"]["headroom"]["maps"]) == 2
    assert all(run["bits"] is not None for run in then["runs"])


def test_curves_skips_and_headroom_are_those_of_the_records(tmp_path):
    write_run(tmp_path, "post", diverges_at=90)
    write_any(tmp_path, "over", layers=3, growth=40.0)
    found = state(tmp_path)
    curves, heat = found["plots"]["curves"], found["plots"]["headroom"]
    lost = next(line for line in curves["lines"] if line["run"].startswith("post"))
    assert lost["lost"] and [86, "skipped: forward"] in lost["m"]
    assert len(found["pool"][lost["x"]]) == 86  # the steps with a finite loss
    over = next(part for part in heat["maps"] if part["run"] == "over")
    assert found["pool"][over["x"]] == [0.0, 20.0, 40.0]
    assert over["v"][-1] == [pytest.approx(16.0, abs=0.05), -1.0, -1.0]  # layer 3 overflows from step 20 on
    assert row(tmp_path, "over")["bits"] == -1.0


def test_nothing_is_written(tmp_path):
    write_run(tmp_path, "pre")

    def files() -> dict[str, float]:
        return {str(path): path.stat().st_mtime for path in tmp_path.rglob("*")}

    before = files()
    state(tmp_path)
    assert files() == before


# --- the server ----------------------------------------------------------------------------------------------


def test_it_answers_on_loopback_under_its_own_name_alone(tmp_path):
    write_run(tmp_path, "pre")
    with served(tmp_path) as address:
        with urllib.request.urlopen(address) as answer:
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert b"<table" in answer.read()
        with urllib.request.urlopen(address + "state.json") as answer:
            assert json.load(answer)["runs"][0]["name"] == "pre_lr0.002_seed1"
        port = int(address.rstrip("/").rpartition(":")[2])
        for path, host, code in (("/", "evil.example:80", 403), ("/../etc/passwd", f"localhost:{port}", 404)):
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("GET", path, headers={"Host": host})
            assert connection.getresponse().status == code
            connection.close()
        with pytest.raises(UserError, match=f"--port {port}: address already in use"):
            server_of(Watch(tmp_path), port, 1.0)


def test_mistakes_are_refused(tmp_path):
    for words, said in (
        ([str(tmp_path / "nowhere")], "is missing"),
        ([str(tmp_path), "--port", "70000"], "--port must be 0 to 65535, not 70000"),
        ([str(tmp_path), "--every", "0"], "--every must be at least 0.2 seconds, not 0"),
    ):
        with pytest.raises(UsageError, match=said):
            check(parse(words))


@pytest.mark.slow
def test_the_command_serves_and_needs_no_torch(tmp_path):
    write_run(tmp_path, "pre")
    command = [sys.executable, "-m", "eval.live", str(tmp_path), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        address = server.stdout.readline().split()[0]
        with urllib.request.urlopen(address + "state.json") as answer:
            assert json.load(answer)["runs"]
        mapped = Path(f"/proc/{server.pid}/maps")
        assert not mapped.exists() or "libtorch" not in mapped.read_text()
    finally:
        server.terminate()
        server.wait(timeout=20)


# --- the page ------------------------------------------------------------------------------------------------

COUNT = "document.querySelectorAll('#runs tbody tr').length"
PRE = "document.querySelector('#runs tbody tr:nth-child(1)').innerText"  # it runs, and Post-LN does not
LINE = "[...document.querySelectorAll('#figure-curves path[stroke-linejoin]')].at(-1).getAttribute('d').length"
UNTIL = """(async () => {
  for (let i = 0; i < 350; i++) { if (%s) return true; await new Promise(r => setTimeout(r, 100)); }
})()"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_shows_runs_as_they_grow(tmp_path, width):
    pytest.importorskip("aiohttp", reason="the DevTools protocol is spoken through aiohttp")
    run = write_run(tmp_path, "pre")
    text = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics(run, 50)
    running(run)
    write_run(tmp_path, "post", diverges_at=90)

    class Growing(Watch):
        asked = 0

        def state(self) -> str:
            self.asked += 1
            if self.asked == 6:  # the page has shown the first steps
                with open(run / "metrics.jsonl", "a") as file:
                    file.writelines(text[50:120])
            return re.sub(r'"pause": [0-9.]+', '"pause": 0.3', super().state())  # however slow this machine is

    ready, grown = UNTIL % f"{COUNT} === 2", UNTIL % f"{PRE}.includes('120 of 200')"
    off = "document.querySelector('input[data-value=post]').click()"
    still = "document.querySelector('input[data-value=post]').checked"
    maps = "document.querySelectorAll('#figure-headroom .canvas rect').length"
    with served(tmp_path, Growing(tmp_path)) as address:
        seen = look(address, width, scripts=[ready, PRE, LINE, off, grown, LINE, still, maps])
    is_ready, first, short, _, has_grown, long, chosen, cells = seen.answers
    assert is_ready and has_grown and "running" in first and "50 of 200" in first and "5 min" in first
    assert long > 1.5 * short
    assert chosen is False  # what was chosen stays
    assert cells > 50
    assert seen.problems == [] and seen.page["wide"] == []
    assert seen.page["scroll"] <= seen.page["width"] <= width
