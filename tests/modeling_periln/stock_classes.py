"""Which of the stock architectures the installed Transformers can build; the oldest admitted one lacks some."""

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from modeling_periln.conversions import ARCHITECTURES


def needs(target: str) -> None:
    """Skip the test where Transformers itself cannot build `target`, a key of `ARCHITECTURES`."""
    row, version = ARCHITECTURES[target], transformers.__version__
    name = row.config_name or f"{row.name}Config"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {version} has no {name}")
    try:
        getattr(transformers, name)(tie_word_embeddings=False)
    except StrictDataclassError:
        # Declared as an int; the newer releases of huggingface_hub that 5.4 admits no longer take a bool for one.
        pytest.skip(f"transformers {version} cannot build a {name}: it refuses tie_word_embeddings=False")
