"""The SLURM script, with stand-ins for srun, scontrol and python that say what they were called with."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from tiny import ROOT

SCRIPT = ROOT / "scripts" / "launch" / "slurm.sbatch"
STAND_INS = {
    # One task: the options are srun's, what follows them is run.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_PROCID=3 SLURM_LOCALID=1 exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "n7\\nn8\\n"; else echo "scontrol $*" >> "$SEEN"; fi',
    "python": 'echo "python $*" >> "$SEEN"; env >> "$SEEN"; exit "$CODE"',
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


def submit(folder: Path, *args: str, code: int = 0, seconds: int = 90) -> tuple[subprocess.CompletedProcess, list[str]]:
    """What the script did where the trainer ends with `code` after `seconds`: its end, and what the stand-ins saw."""
    for name, text in STAND_INS.items():
        file = folder / name
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    seen = folder / "seen"
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "16", "SLURM_JOB_NODELIST": "n[7-8]"}
    env = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SEEN": str(seen), "CODE": str(code)}
    slurm["SECONDS"] = str(seconds)  # where bash begins to count
    done = subprocess.run(["bash", SCRIPT, *args], env=env | slurm, capture_output=True, text=True, check=False)
    return done, seen.read_text().splitlines() if seen.exists() else []


def test_every_task_is_a_rank_and_gets_the_words_behind_the_engine(tmp_path):
    done, seen = submit(tmp_path, "a b.yaml", "fsdp2", "--runs", "my runs", "--set", "seed=2")
    assert done.returncode == 0, done.stderr
    assert seen[0] == "python -m scripts.pretrain --config a b.yaml --runs my runs --set seed=2"
    expected = {"RANK=3", "WORLD_SIZE=16", "LOCAL_RANK=1", "MASTER_ADDR=n7", "MASTER_PORT=20042"}
    assert expected | {"ACCELERATE_USE_FSDP=true"} <= set(seen)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("", set()),
        ("ddp", set()),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED=true", "ACCELERATE_DEEPSPEED_ZERO_STAGE=3"}),
    ],
)
def test_an_engine_is_what_its_variables_say(tmp_path, engine, words):
    _, seen = submit(tmp_path, "r.yaml", *([engine] if engine else []))
    assert {line for line in seen if line.startswith("ACCELERATE_")} == words


@pytest.mark.parametrize(("code", "again"), [(143, True), (0, False), (1, False), (2, False), (130, False)])
def test_only_a_run_that_was_told_to_stop_is_queued_again(tmp_path, code, again):
    done, seen = submit(tmp_path, "r.yaml", code=code)
    assert done.returncode == code
    assert ("scontrol requeue 42" in seen) == again


def test_a_time_limit_that_leaves_no_time_is_not_an_endless_loop(tmp_path):
    done, seen = submit(tmp_path, "r.yaml", code=143, seconds=-1000)
    assert done.returncode == 143
    assert "scontrol requeue 42" not in seen
    assert "is the time limit above that of --signal?" in done.stderr


def test_what_is_asked_wrongly_is_said_before_anything_starts(tmp_path):
    done, seen = submit(tmp_path, "r.yaml", "horovod")
    assert (done.returncode, seen) == (2, [])
    assert "ENGINE must be ddp, fsdp2, zero2 or zero3, not horovod" in done.stderr
    done, seen = submit(tmp_path)
    assert done.returncode != 0 and seen == []
    assert "the recipe is missing" in done.stderr
