"""One thread for every test and for the processes that tests start: tiny models are faster so, and equal to the bit."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """The fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
