"""A study's records: small enough for a repository, enough to judge again and to continue on another machine."""

import json
import math
from pathlib import Path
from typing import Any

from periln.eval.study.verdicts import Verdict
from periln.runkit.errors import UserError
from periln.runkit.folder import read_json, write_json, write_text
from periln.runkit.public import public
from periln.runkit.studies import CELLS, FROZEN, Study

LARGEST = 5_000_000  # bytes
WORDS = ("details", "what_would_change_it")


def export(study: Study, results: dict[str, dict[str, Any]], verdicts: list[Verdict], out: Path) -> int:
    """Write plan, claims, results and verdicts to `out`; what it holds of the same study is kept. Returns the bytes.

    Raises:
        UserError: `out` holds another study's records, or the records are too large for a repository.
    """
    text = "".join(json.dumps(public(results[name]), sort_keys=True) + "\n" for name in sorted(results))
    if len(text) > LARGEST:
        raise UserError(f"{out}: the records take {len(text) / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f} MB")
    frozen = read_json(study.path / "frozen.json")
    if (out / "frozen.json").exists() and read_json(out / "frozen.json") != frozen:
        raise UserError(f"{out} holds the records of another study: give another folder with --records")
    if out.resolve() != study.path.resolve():
        for name in FROZEN:
            write_text(out / name, (study.path / name).read_text(encoding="utf-8"))
        write_json(out / "frozen.json", frozen)
    write_text(out / CELLS, text)
    write_json(out / "verdicts.json", [verdict.record() for verdict in verdicts])
    _write_texts(study, {result["data"] for result in results.values()}, out / "data.json")
    return len(text)


def _write_texts(study: Study, read: set[str], file: Path) -> None:
    """Add this machine's text to the list of texts that cells have read; machines may have prepared different ones."""
    known = read_json(file) if file.exists() else []
    texts = {text["fingerprint"]: text for text in (known if isinstance(known, list) else [known])}  # before: one alone
    index = study.path / study.plan["data"]["path"] / "index.json"
    if index.exists():
        data = read_json(index)
        kept = ("tokens", "documents", "bytes", "heldout_documents", "heldout_bytes", "fingerprint", "skipped")
        source = {k: v for k, v in data["source"].items() if k in ("rule", "mixture", "near_duplicates", "listing")}
        texts[data["fingerprint"]] = {name: data.get(name) for name in kept} | {"source": source}
    if texts:
        write_json(file, [texts[fingerprint] for fingerprint in sorted(texts) if fingerprint in read])


def _same(new: Any, old: Any) -> bool:
    """Equal; numbers to one in a thousand, as another SciPy may give them; words about them are left out."""
    if isinstance(new, dict) and isinstance(old, dict):
        return new.keys() == old.keys() and all(_same(new[k], old[k]) for k in new if k not in WORDS)
    if isinstance(new, list) and isinstance(old, list):
        return len(new) == len(old) and all(map(_same, new, old))
    if isinstance(new, float) and isinstance(old, (int, float)):
        return math.isclose(new, old, rel_tol=1e-3, abs_tol=1e-6)
    return new == old


def compare(out: Path, verdicts: list[Verdict]) -> list[str]:
    """How recomputed verdicts differ from those that `out` holds; empty where they are the same.

    Raises:
        UserError: it holds none.
    """
    stored = {entry["claim"]: entry for entry in read_json(out / "verdicts.json")}
    lines = []
    for verdict in verdicts:
        new, old = verdict.record(), stored.pop(verdict.name, None)
        if not _same(new, old):
            was = old["verdict"] if old else "absent"
            before = (old["parts"] if old else []) + [None] * len(new["parts"])
            parts = [i for i, part in enumerate(new["parts"]) if not _same(part, before[i])]
            named = "; ".join(new["parts"][i]["words"] for i in parts)
            lines.append(f"{verdict.name}: stored {was}, recomputed {verdict.verdict}{f' ({named})' if named else ''}")
    return lines + [f"{name}: stored, and no claim of the study" for name in stored]
