"""What a section found, on the disk after every entry: a section that is ended loses nothing."""

import math
import time
from pathlib import Path
from typing import Any

from periln.runkit.folder import write_json


class Skipped(Exception):
    """A section cannot be done here; the message says why."""


def plain(value: Any) -> Any:
    """Data for JSON: numbers that are not finite become their names."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Notes:
    """One section's: `check` for what must hold, `measure` for numbers, `leave_out` for what time did not allow.

    Args:
        file: rewritten after every entry.
        seconds: the section's deadline, from now.
    """

    def __init__(self, file: Path, seconds: float):
        self.file, self._end = file, time.monotonic() + seconds
        self.found: dict[str, Any] = {"checks": [], "measured": {}, "left_out": [], "skipped": None, "error": None}
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._end - time.monotonic()

    def check(self, name: str, holds: bool, value: Any, wanted: str) -> None:
        self.found["checks"].append({"name": name, "holds": bool(holds), "value": value, "wanted": wanted})
        self._write()

    def measure(self, name: str, value: Any) -> None:
        self.found["measured"][name] = value
        self._write()

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether `seconds` are left for `name`; where they are not, it is entered as left out."""
        if self.left >= seconds:
            return True
        self.found["left_out"].append(name)
        self._write()
        return False

    def end(self, skipped: str | None = None, error: str | None = None) -> None:
        self.found |= {"skipped": skipped, "error": error}
        self._write()

    def _write(self) -> None:
        write_json(self.file, plain(self.found))


def status_of(found: dict[str, Any]) -> str:
    """`pass`, `fail` or `skipped` of a section's entries."""
    if found["error"] or not all(one["holds"] for one in found["checks"]):
        return "fail"
    return "skipped" if found["skipped"] else "pass"
