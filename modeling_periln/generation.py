"""What generate() is handed and returns, besides Transformers' own."""

import functools
from typing import Any

from transformers.generation import GenerationMixin


class CacheUnderBothNames(GenerationMixin):
    """The cache under its old name too: PEFT 0.21's prompt learning looks for it there, and where it finds none it puts
    the prompt before every token that is generated.
    """

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if "cache" in inputs:
            inputs.setdefault("past_key_values", inputs["cache"])
        return inputs
