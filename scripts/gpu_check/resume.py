"""Section `resume`: a real run, killed and resumed, ends with the bits of the run that nobody touched."""

import subprocess
import time
from pathlib import Path

from periln.runkit.folder import RunFolder, weights_hash
from periln.runkit.process import python_m
from periln.runkit.recipes import dump_yaml, read_yaml, to_mapping
from periln.scripts.gpu_check.notes import Notes
from periln.scripts.gpu_check.place import QUIET, RECIPES, Place

FIELDS = ("loss", "grad_norm", "loss_scale", "found_inf")


def _recipe(place: Place) -> Path:
    fields = {"steps": 12, "checkpoint_every": 3, "deterministic": True, "name": "resumed"}
    if place.toy:
        recipe = place.tiny(**fields, model={"vocab_size": 300})
    else:
        base = read_yaml(RECIPES / "1m-peri.yaml") | QUIET
        shape = {"steps": 40, "checkpoint_every": 10}
        recipe = place.recipe(base, **fields | shape, model={"vocab_size": 300})
    file = place.out / "resumed.yaml"
    file.write_text(dump_yaml(to_mapping(recipe)))
    return file


def _start(file: Path, runs: Path, log: Path) -> subprocess.Popen:
    words = [*python_m("scripts.pretrain"), "--config", str(file), "--runs", str(runs)]
    with open(log, "a") as output:
        return subprocess.Popen(words, stdout=output, stderr=output)


def _ended(place: Place, name: str, file: Path) -> RunFolder:
    process = _start(file, place.out / name, place.out / "resume.log")
    if code := process.wait():
        raise RuntimeError(f"the run ended with {code}: see resume.log")
    return RunFolder(place.out / name / "resumed")


def check_resume(place: Place, notes: Notes) -> None:
    file = _recipe(place)
    untouched = _ended(place, "untouched", file)
    folder = RunFolder(place.out / "killed" / "resumed")
    process = _start(file, place.out / "killed", place.out / "resume.log")
    while len(folder.metrics()) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    notes.measure("steps_when_killed", len(folder.metrics()))
    killed = _ended(place, "killed", file)
    both = [[{key: r[key] for key in FIELDS} for r in run.metrics()] for run in (killed, untouched)]
    notes.check("records of the resumed run", both[0] == both[1], len(both[0]), "those of the untouched run")
    hashes = [weights_hash(run.checkpoints()[-1]) for run in (killed, untouched)]
    notes.check("weights of the resumed run", hashes[0] == hashes[1], hashes, "bit-equal to the untouched run's")
    losses = [record["loss"] for record in both[1]]
    notes.check("the run learns", losses[-1] < losses[0], [losses[0], losses[-1]], "a lower last loss")
