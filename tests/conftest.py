"""The surroundings of every test, and of the processes that tests start.

One thread: tiny models are faster so, and equal to the bit. And no setting of the Hub from outside: a test that needs
one (another endpoint, offline) says so itself, whatever the machine's own are.
"""

import gc
import os

gc.disable()  # until all is imported: there is no garbage, and looking for it takes a fifth of the time
os.environ["OMP_NUM_THREADS"] = "1"
for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_TOKEN", "HF_HOME"):
    os.environ.pop(_name, None)

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay: no collection need look at them
    gc.enable()


# Minutes each, and slow from the first test to the last. First, so that none is left for one worker alone at the end.
LONGEST = (
    "scripts/training/test_engines.py",
    "scripts/training/test_resume_on_two_ranks.py",
    "scripts/study/test_study_run.py",
    "scripts/test_compiled_runs.py",
    "scripts/training/test_zero.py",
)


def pytest_collection_modifyitems(items):
    """The fast tests first, then the longest files."""

    def place(item) -> tuple[bool, int]:
        rank = next((i for i, file in enumerate(LONGEST) if item.nodeid.startswith(f"tests/{file}")), len(LONGEST))
        return item.get_closest_marker("slow") is not None, rank

    items.sort(key=place)
