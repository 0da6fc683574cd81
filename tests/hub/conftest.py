"""A Hub on loopback for the tests of a file, and what is pushed to it."""

from collections.abc import Iterator

import hub_run
import huggingface_hub
import pytest
from local_hub import LocalHub

from periln.runkit.errors import run_command
from periln.scripts.arguments.push import parse
from periln.scripts.push import command as push


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[LocalHub]:
    """The server, with endpoint and token in the environment as a user would set them."""
    with pytest.MonkeyPatch.context() as patch, LocalHub(tmp_path_factory.mktemp("hub")) as server:
        patch.setenv("HF_ENDPOINT", server.url)
        patch.setenv("HF_TOKEN", server.token)
        # Read when the client is imported, which other tests have done already.
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A completed Peri-LN run; not to be changed."""
    return hub_run.write_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def pushed(capsys):
    """Push in this process: (exit code, what was printed, what was reported as an error)."""

    def call(*words: object) -> tuple[int, str, str]:
        code = run_command(push.main, parse([str(word) for word in words]))
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
