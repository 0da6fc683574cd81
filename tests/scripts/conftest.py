"""What the tests of pretraining share."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from tiny import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data folder with a vocabulary of 300."""
    return make_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a process; a test may have its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
