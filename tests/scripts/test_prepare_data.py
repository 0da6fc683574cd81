"""Preparation: whole or not at all, the same to the byte however often it was killed, from files and from the Hub."""

import base64
import errno
import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from local_hub import LocalHub
from tiny import ROOT, command, run
from transformers import AutoTokenizer

from periln.runkit.errors import UsageError, UserError
from periln.scripts import prepare_data
from periln.scripts.data.token_data import TokenData
from periln.scripts.prepare_data import prepare

SMALL = {"vocab_size": 300, "heldout_share": 0.02, "context": 64, "shard_tokens": 20_000}


def documents(count: int, start: int = 0) -> list[dict]:
    rng = random.Random(start)
    return [
        {"text": " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 60))) + f" of {start + i}"}
        for i in range(count)
    ]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "a.jsonl", documents(1500) + documents(3) + [{"text": " "}])
    write_jsonl(folder / "b.jsonl.gz", documents(1500, 2000))
    pd.DataFrame(documents(1000, 5000)).to_parquet(folder / "c.parquet", row_group_size=300)
    return folder


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "data"
    prepare(str(text), out, **SMALL)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def work_folders(out: Path) -> list[Path]:
    return list(out.parent.glob(f".{out.name}.*.work"))


def test_every_document_is_there_once(text, undisturbed):
    data = TokenData(undisturbed)
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    starts = [0, *data.document_ends(0, len(data))]
    stream = data.read(0, len(data))
    train = [tokenizer.decode(stream[a : b - 1]) for a, b in pairwise(starts)]
    expected = [r["text"] for r in (*documents(1500), *documents(1500, 2000), *documents(1000, 5000))]
    heldout = data.heldout_documents()
    assert sorted(train + heldout) == sorted(expected)
    assert train == [t for t in expected if t not in set(heldout)]
    assert data.index["documents"] == len(train) and data.index["heldout_documents"] == len(heldout) > 40
    assert data.index["bytes"] + data.index["heldout_bytes"] == sum(len(t) for t in expected)
    assert data.index["skipped"] == {"duplicate": {"count": 3}, "empty": {"count": 1}}
    assert len((undisturbed / "skipped.jsonl").read_text().splitlines()) == 4
    assert data.index["dtype"] == "uint16" and len(data.index["shards"]) > 5
    assert not work_folders(undisturbed)
    data.verify()


def _in_a_process(text, out):
    os.close(2)  # its progress is not read
    prepare(str(text), out, save_seconds=0, **SMALL)


def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(text, undisturbed, tmp_path):
    out, rng, kills, places = tmp_path / "data", random.Random(1), 0, set()
    fork = multiprocessing.get_context("fork")

    def state():
        states = [work / "state.json" for work in work_folders(out)]
        return [json.loads(file.read_text())["shards"]["documents"] for file in states if file.exists()]

    while not out.exists():
        before = state()
        process = fork.Process(target=_in_a_process, args=(text, out))
        process.start()
        # The first at any moment, while the tokenizer is made, say; the others soon after they got on.
        until = time.monotonic() + (rng.uniform(0.01, 0.2) if kills < 5 else 60)
        while process.is_alive() and time.monotonic() < until and (kills < 5 or state() == before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        kills += process.is_alive()
        process.kill()
        process.join()
        places.update(state())
    assert kills >= 8 and len(places) >= 4, (kills, places)
    assert contents(out) == contents(undisturbed)
    assert not work_folders(out)


@pytest.mark.parametrize("place", ["write_json", "publish"])
def test_a_kill_at_any_commit_loses_and_repeats_nothing(text, undisturbed, tmp_path, monkeypatch, place):
    out, real, stops = tmp_path / "data", getattr(prepare_data, place), 0

    def stop_behind(*args, **kwargs):
        monkeypatch.setattr(prepare_data, place, stop_before)
        real(*args, **kwargs)
        raise KeyboardInterrupt

    def stop_before(*args, **kwargs):
        monkeypatch.setattr(prepare_data, place, stop_behind)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, place, stop_before)
    while True:
        try:
            prepare(str(text), out, save_seconds=0, **SMALL)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= (20 if place == "write_json" else 2)
    assert TokenData(out).index == TokenData(undisturbed).index
    TokenData(out).verify()


@pytest.mark.slow
def test_a_killed_command_leaves_no_worker_and_goes_on_to_the_same_bytes(text, undisturbed, tmp_path):
    out = tmp_path / "data"
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    words = ["--source", text, "--out", out, "--workers", 2, "--save-seconds", 0, *options]
    process = subprocess.Popen(
        command("scripts.prepare_data", *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not any((work / "state.json").exists() for work in work_folders(out)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workers) == 2
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    done = run("scripts.prepare_data", *words)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(undisturbed)
    assert "tok/s" in done.stderr and "skipped: 3 duplicate, 1 empty" in done.stdout
    broken = bytearray((out / "train-00001.bin").read_bytes())
    broken[7] ^= 1
    (out / "train-00001.bin").write_bytes(broken)
    with pytest.raises(UserError, match=r"train-00001\.bin has changed"):
        prepare_data.main(prepare_data.parse(["--out", str(out), "--verify"]))


def _children(pid: int) -> list[int]:
    return [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("most", [1, 5_000, 20_000, 33_333])
def test_tokens_end_with_the_document_that_reaches_the_number_asked_for(text, undisturbed, tmp_path, most):
    prepare(str(text), tmp_path / "data", max_tokens=most, **SMALL)
    data, whole = TokenData(tmp_path / "data"), TokenData(undisturbed)
    tokenizers = [(folder / "tokenizer" / "tokenizer.json").read_text() for folder in (data.path, whole.path)]
    assert tokenizers[0] == tokenizers[1]
    last_but_one = [0, *data.document_ends(0, len(data))][-2]
    assert last_but_one < most <= len(data)
    assert (data.read(0, len(data)) == whole.read(0, len(data))).all()
    assert len(data.heldout_documents()) == data.index["heldout_documents"] > 0
    data.verify()
    if most == 5_000:  # workers have the reading run ahead of the end
        prepare(str(text), tmp_path / "ahead", max_tokens=most, workers=2, **SMALL)
        assert contents(tmp_path / "ahead") == contents(tmp_path / "data")


def test_data_that_is_there_is_kept_and_other_options_are_refused(text, undisturbed):
    before = (undisturbed / "train-00000.bin").stat().st_mtime_ns
    prepare(str(text), undisturbed, workers=2, **SMALL)
    assert (undisturbed / "train-00000.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other options"):
        prepare(str(text), undisturbed, **SMALL | {"vocab_size": 310})


def test_the_fingerprint_follows_text_tokenizer_and_options(tmp_path):
    source = write_jsonl(tmp_path / "a.jsonl", documents(20))

    def fingerprint(name, **more):
        return prepare(str(source), tmp_path / name, **SMALL | more)["fingerprint"]

    found = [fingerprint("a"), fingerprint("b", vocab_size=310), fingerprint("c", heldout_share=0.1)]
    found += [fingerprint("d", vocab_size=None, tokenizer=str(tmp_path / "a" / "tokenizer"))]
    write_jsonl(source, [*documents(19), {"text": "changed"}])
    found += [fingerprint("e")]
    assert len(set(found)) == len(found)
    write_jsonl(source, documents(20))
    assert fingerprint("f") == found[0]


def test_a_folder_of_another_tokenizer_is_used_as_it_is(text, undisturbed, tmp_path):
    more = SMALL | {"vocab_size": None, "tokenizer": str(undisturbed / "tokenizer")}
    prepare(str(text), tmp_path / "data", **more)
    one, other = TokenData(tmp_path / "data"), TokenData(undisturbed)
    assert (one.read(0, len(one)) == other.read(0, len(other))).all()


def test_a_full_disk_keeps_the_work_and_the_same_command_goes_on(text, undisturbed, tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(fd):
        calls.append(fd)
        if len(calls) == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space on the disk: .* could not be written; what was there is kept"):
        prepare(str(text), tmp_path / "data", save_seconds=0, **SMALL)
    assert not (tmp_path / "data").exists() and (work_folders(tmp_path / "data")[0] / "state.json").exists()
    prepare(str(text), tmp_path / "data", **SMALL)
    assert contents(tmp_path / "data") == contents(undisturbed)


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    source = write_jsonl(tmp_path / "a.jsonl", documents(600))
    monkeypatch.setattr(prepare_data, "_end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "data", **SMALL)
    write_jsonl(source, documents(601))
    with pytest.raises(
        UserError, match=r"files have changed since its preparation began: remove .*\.work to start over"
    ):
        prepare(str(source), tmp_path / "data", **SMALL)


def test_a_column_that_a_dataset_has_not_is_named_with_those_it_has(tmp_path):
    write_jsonl(tmp_path / "web" / "a.jsonl", [{"body": "x", "url": "y"}])
    message = r"web has no column 'text' \(it has body, url\); --text-column names another"
    with pytest.raises(UserError, match=message):
        prepare(f"hf:{tmp_path / 'web'}", tmp_path / "data", **SMALL)


def test_two_preparations_of_one_folder_do_not_meet(text, tmp_path):
    options = prepare_data.Options(str(text.resolve()), 300, None, 0.02, 64, shard_tokens=20_000)
    message = "data is being prepared by another process"
    with prepare_data.work_folder(tmp_path / "data", options), pytest.raises(UserError, match=message):
        prepare(str(text), tmp_path / "data", **SMALL)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"vocab_size": 260}, "vocab_size 260 is smaller than the 256 bytes"),
        ({"heldout_share": 1.5}, "heldout_share must lie between 0 and 1, not 1.5"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"shard_tokens": 1 << 32}, "shard_tokens must lie between 1 and 4294967295"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"tokenizer": "cl100k_base"}, "vocab_size belongs to the tokenizer bpe"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(text, tmp_path, more, message):
    with pytest.raises(UsageError, match=message):
        prepare(str(text), tmp_path / "data", **SMALL | more)
    assert not list(tmp_path.iterdir())


def test_what_stands_in_the_way_is_left_alone(text, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no prepared data"):
        prepare(str(text), tmp_path / "data", **SMALL)
    with pytest.raises(UserError, match=r"cannot write .*thesis\.txt.*: Not a directory"):
        prepare(str(text), tmp_path / "data" / "thesis.txt" / "data", **SMALL)


@pytest.mark.slow
def test_a_dataset_is_streamed_from_the_hub_and_goes_on_after_a_kill(tmp_path):
    repository = tmp_path / "store" / "datasets" / "local" / "web"
    for number in range(3):
        records = [{"body": record["text"], "url": "x"} for record in documents(400, 1000 * number)]
        write_jsonl(repository / "extra" / f"part-{number}.jsonl.gz", records)
    card = "---\nconfigs:\n- config_name: extra\n  data_files:\n  - split: train\n    path: extra/*.jsonl.gz\n---\n"
    (repository / "README.md").write_text(card)
    expected = [record["text"] for number in range(3) for record in documents(400, 1000 * number)]
    with LocalHub(tmp_path / "store") as hub:
        store = hub.server.RequestHandlerClass.store
        store.commit("datasets", "local/web", [])
        env = [f"HF_ENDPOINT={hub.url}", f"HF_HOME={tmp_path / 'home'}", "HF_HUB_DISABLE_XET=1"]
        out = tmp_path / "data"
        words = ["--source", "hf:local/web", "--dataset-config", "extra", "--vocab-size", 300, "--save-seconds", 0]
        words += ["--workers", 1, "--out", out, "--text-column", "body"]
        started = ["env", *env, *command("scripts.prepare_data", *words)]
        process = subprocess.Popen(started, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (states := list(tmp_path.glob(".data.*.work/state.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert 0 < json.loads(states[0].read_text())["mark"]["position"]["count"] < 1200
        commit = json.loads((states[0].parent / "source.json").read_text())["commit"]
        # The dataset moves on meanwhile; what was begun is ended with the text it was begun with.
        packed = (repository / "extra" / "part-0.jsonl.gz").read_bytes()
        changed = {"path": "extra/part-2.jsonl.gz", "content": base64.b64encode(packed).decode()}
        assert store.commit("datasets", "local/web", [{"key": "file", "value": changed}]) != commit
        done = run("scripts.prepare_data", *words, env=env)
    assert done.returncode == 0, done.stderr
    data = TokenData(out)
    assert data.index["source"] == {"commit": commit} and len(commit) == 40
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    starts = [0, *data.document_ends(0, len(data))]
    stream = data.read(0, len(data))
    train = [tokenizer.decode(stream[a : b - 1]) for a, b in pairwise(starts)]
    heldout = set(data.heldout_documents())
    assert train == [text for text in expected if text not in heldout] and len(heldout) > 5
    assert data.index["skipped"] == {}  # nothing was read twice


def test_a_hub_that_does_not_answer_is_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot read the dataset local/web: ConnectError"):
        prepare("hf:local/web", tmp_path / "data", **SMALL)
    assert not (tmp_path / "data").exists()
