"""Check the types of the checkout: `python .ci/check_types.py [--write]`.

The folders are laid out as an installation has them (`periln.eval` is `eval/`), by links in a temporary folder, and
mypy reads that. `.ci/types.json` holds the number of errors that each folder may have: a folder with more of them
fails, and with fewer it asks for the number to be lowered (`--write`). `runkit` and `periln` are checked strictly and
have none; `modeling_periln` is checked strictly too, with a number of its own.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = ROOT / ".ci" / "types.json"
FOLDERS = ("eval", "model_cards", "runkit", "scripts", "sft")


def lay_out(place: Path) -> None:
    """The packages `periln` and `modeling_periln`, of links to the folders."""
    (place / "periln").mkdir()
    (place / "modeling_periln").symlink_to(ROOT / "modeling_periln")
    for name in FOLDERS:
        (place / "periln" / name).symlink_to(ROOT / name)
    for file in (ROOT / "periln").iterdir():
        if file.is_file():
            (place / "periln" / file.name).symlink_to(file)


def errors(place: Path) -> list[str]:
    """mypy's lines about errors, with paths as in the checkout."""
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    command += ["--cache-dir", ROOT / ".mypy_cache", "-p", "periln", "-p", "modeling_periln"]
    done = subprocess.run(list(map(str, command)), cwd=place, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        sys.exit(f"error: mypy did not run: {done.stdout}{done.stderr}")
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    return [line.removeprefix("periln/") if line.split("/")[1] in FOLDERS else line for line in lines]


def main() -> int:
    allowed = json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        lay_out(Path(place))
        found = errors(Path(place))
    counts = Counter(line.split("/")[0] for line in found)
    names = sorted({*FOLDERS, "modeling_periln", "periln"})
    if "--write" in sys.argv[1:]:
        ALLOWED.write_text(json.dumps({name: counts[name] for name in names if counts[name]}, indent=2) + "\n")
        allowed = json.loads(ALLOWED.read_text())
    worse = [name for name in names if counts[name] > allowed.get(name, 0)]
    better = [name for name in names if counts[name] < allowed.get(name, 0)]
    for line in found:
        if line.split("/")[0] in worse:
            print(line)
    for name in worse:
        print(f"error: {name}/ has {counts[name]} type errors, {allowed.get(name, 0)} are allowed", file=sys.stderr)
    for name in better:
        print(f"{name}/ has {counts[name]} type errors left: lower its number (--write)")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
