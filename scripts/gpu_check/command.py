"""`python -m scripts.gpu_check --out DIR`: at most six minutes, one JSON, rewritten after every section.

Every section is a process of its own with a deadline: one that hangs or crashes costs its own time, and what it had
found by then is kept. On a CPU the same sections run at toy size. Nothing here changes a setting of the accelerator.

    gpu_check.json   device, size (toy or full), seconds, and for each section: status (pass, fail, skipped), reason,
                     seconds, deadline_seconds, checks (name, holds, value, wanted), measured, left_out
"""

import argparse
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from periln.runkit.folder import read_json, write_json
from periln.runkit.process import python_m, start_stage
from periln.scripts.arguments.gpu_check import RESULT, SECONDS, SECTIONS, check
from periln.scripts.gpu_check.notes import Notes, Skipped, status_of


def notes_file(out: Path, name: str) -> Path:
    return out / f"section_{name}.json"


def run_section(name: str, out: Path, device: str | None, seconds: float) -> None:
    """One section in this process; what it finds, and how it ends, is in its notes."""
    notes = Notes(notes_file(out, name), seconds)
    try:
        from periln.scripts.gpu_check.sections import FUNCTIONS, place_of

        place = place_of(out, device)
        notes.measure("place", place.describe())
        FUNCTIONS[name](place, notes)
    except Skipped as reason:
        notes.end(skipped=str(reason))
    except Exception as error:
        notes.end(error=f"{type(error).__name__}: {' '.join(str(error).split())[:2000]}")
        raise


def _command(name: str, args: argparse.Namespace, seconds: float) -> list[str]:
    words = [*python_m("scripts.gpu_check"), "--one-section", name, "--out", str(args.out), "--seconds", str(seconds)]
    words += ["--device", args.device] if args.device else []
    words += ["--threads", str(args.threads)] if args.threads else []
    return [*words, "--debug", "--stop-with-parent", str(os.getpid())]


def _section_apart(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A section in a process of its own, ended with what it started when its time is over."""
    started = time.monotonic()
    log = args.out / f"section_{name}.log"
    with open(log, "w") as output:
        process = subprocess.Popen(_command(name, args, seconds), stdout=output, stderr=output, start_new_session=True)
        late = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    file = notes_file(args.out, name)
    found = read_json(file) if file.exists() else {"checks": [], "measured": {}, "left_out": []}
    found = {"skipped": None, "error": None} | found
    if late:
        found["error"] = f"it ran past its {seconds:.0f} seconds"
    elif process.returncode and not found["error"]:
        found["error"] = f"its process ended with {process.returncode}: see {log.name}"
    file.unlink(missing_ok=True)
    reason = found.pop("error"), found.pop("skipped")
    whole = found | {"error": reason[0], "skipped": reason[1]}
    return {
        "status": status_of(whole),
        "reason": reason[0] or reason[1],
        "seconds": round(time.monotonic() - started, 1),
        "deadline_seconds": round(seconds, 1),
    } | found


def describe(record: dict[str, Any]) -> str:
    """The result for a terminal: a line a section, and what failed."""
    lines = [f"{record['device_name'] or record['device']}, {record['size']} size, {record['seconds']:.0f} s"]
    for name, section in record["sections"].items():
        held = sum(one["holds"] for one in section["checks"])
        line = f"{name:12}{section['status']:9}{section['seconds']:6.1f} s   {held} of {len(section['checks'])} checks"
        lines.append(line + (f"   {section['reason']}" if section["reason"] else ""))
        for one in section["checks"]:
            if not one["holds"]:
                lines.append(f"            {one['name']}: {one['value']}, wanted {one['wanted']}")
        if section["left_out"]:
            lines.append(f"            no time for {', '.join(section['left_out'])}")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> int:
    start_stage(args)
    check(args)
    if args.one_section:
        run_section(args.one_section, args.out, args.device, args.seconds)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    started, record = time.monotonic(), {"device": args.device, "device_name": None, "size": None, "seconds": 0.0}
    sections: dict[str, Any] = {}
    for name in args.sections or SECTIONS:
        seconds = SECTIONS[name] * args.seconds / SECONDS
        sections[name] = _section_apart(name, args, seconds)
        record |= sections[name]["measured"].pop("place", {})
        record["seconds"] = round(time.monotonic() - started, 1)
        write_json(args.out / RESULT, record | {"sections": sections})
    print(describe(record | {"sections": sections}))
    print(f"\n{args.out / RESULT}")
    return int(any(section["status"] == "fail" for section in sections.values()))
