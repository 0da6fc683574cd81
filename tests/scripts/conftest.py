"""What the tests of pretraining share."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny import make_data
from torch import nn
from torch._dynamo.utils import counters


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared data folder with a vocabulary of 300."""
    return make_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps one precision for a process; a test may have its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_compiler():
    """No graphs of tests before, and none counted."""
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def quick_compiler(monkeypatch, fresh_compiler):
    """Graphs as always, forward and backward, run by the eager operators: it takes no minute."""
    whole, plain = nn.Module.compile, torch.compile

    def compile_module(self, dynamic, options):
        return whole(self, dynamic=dynamic, backend="aot_eager")

    def compile_function(function=None, *, options=None, **kwargs):
        return plain(function, **kwargs | {"backend": "aot_eager"})

    monkeypatch.setattr(nn.Module, "compile", compile_module)
    monkeypatch.setattr(torch, "compile", compile_function)
