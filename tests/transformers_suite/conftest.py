"""What `make test-hf` needs to be there, and what it says of the folder that it was given."""

import importlib.util
import os
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGES = ("parameterized", "psutil")


def pytest_configure(config: pytest.Config) -> None:
    # Only where the suite is asked for: a run of our own tests comes through this folder too.
    if not any(Path(__file__).parent.name in str(argument) for argument in config.invocation_params.args):
        return
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(f"Transformers' tests need {', '.join(missing)}: pip install {' '.join(missing)}")
    if not os.environ.get("TRANSFORMERS_SRC"):
        raise pytest.UsageError(
            "say where Transformers' source is, a git checkout or an unpacked source distribution of the version "
            "installed: make test-hf TRANSFORMERS_SRC=/path/to/transformers"
        )
    import common_tests

    source = Path(os.environ["TRANSFORMERS_SRC"]).resolve()
    try:
        version = common_tests.source_version(source)
    except ValueError as error:
        raise pytest.UsageError(f"TRANSFORMERS_SRC: {error}") from None
    common_tests.install(source)
    config.pluginmanager.register(Report(source, version))


class Report:
    """Says before and after the tests what the folder is and lacks; after them, why tests were skipped."""

    def __init__(self, source: Path, version: str):
        import common_tests
        import transformers

        self.lines = [f"Transformers' common tests of {version}, from {source}", *common_tests.NOTES]
        if version != transformers.__version__:
            self.lines.append(
                f"WARNING: tests of Transformers {version}, but {transformers.__version__} is installed: "
                "a failure may mean only that"
            )

    def pytest_report_header(self) -> list[str]:
        return self.lines

    def pytest_terminal_summary(self, terminalreporter: "pytest.TerminalReporter") -> None:
        reasons = Counter()
        for report in terminalreporter.stats.get("skipped", []):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reasons[re.sub(r"\b(PeriLlama\w*|\w+Test)\b", "CLASS", reason.removeprefix("Skipped: "))] += 1
        terminalreporter.section("Transformers' common tests")
        for line in [*self.lines, *(f"{count:5d} skipped: {reason}" for reason, count in reasons.most_common())]:
            terminalreporter.write_line(line)
