"""What tests share that fine-tune in their own process."""

import signal

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def own_process():
    """The signals of the process, and Accelerate's one precision, as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
