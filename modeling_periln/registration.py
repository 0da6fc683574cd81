"""The names of this family's classes, in the tables where Transformers keeps those of its own.

Libraries look a class up by its name to learn what it is, and do something else for a name that is not there, most of
them without a word: the Trainer's label smoothing does not shift the labels, so that the model learns to copy its
input; lm-eval and the generated model card cannot tell the task; the server does not list the model. The auto classes'
`register` does not reach these tables. They are filled wherever the model is imported, installed or as remote code.
A compiled model has the name of its wrapper, and answers by its own instead.
And one library finds a name within ours, and builds another architecture: there the family is refused.
"""

import sys
from typing import Any, NoReturn

from torch._dynamo.eval_frame import OptimizedModule
from transformers.models.auto import modeling_auto

from .configuration_periln import AUTO_MAP, PeriLlamaConfig

_TABLES = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}
# What the Trainer takes for the causal LM's name where it is wrapped: FSDP2 renames the class, and of a model with
# PEFT's prefix tuning the Trainer reads the name of the base model.
_WRAPPED = {"FSDP2": "FSDPPeriLlamaForCausalLM", "prefix tuning": "PeriLlamaModel"}


def _refuse_megatron(plugin: Any, model: Any, batch_data: Any) -> NoReturn:
    raise ValueError(
        f"Accelerate's Megatron-LM plugin cannot train {PeriLlamaConfig.model_type}: it would build Megatron's Llama, "
        "which has no norm placement"
    )


def refuse_megatron() -> None:
    """Have Accelerate's Megatron-LM plugin refuse this family.

    It looks for the names of the architectures that it can build within the model's type, takes the first that it
    finds, and finds `llama` in `peri_llama`. Transformers has imported Accelerate already, where that is installed.
    """
    parsers = getattr(sys.modules.get("accelerate.utils.dataclasses"), "MODEL_CONFIGS_TO_MEGATRON_PARSERS", None)
    if parsers is not None:
        others = {name: parser for name, parser in parsers.items() if name != PeriLlamaConfig.model_type}
        parsers.clear()
        parsers.update({PeriLlamaConfig.model_type: _refuse_megatron} | others)


def name_compiled_models() -> None:
    """Have `torch.compile(model)` answer by the name of the model of this family in it, within PEFT's wrapper or not.

    The Trainer asks the wrapper that it compiles into, and finds no causal LM of the name `OptimizedModule`. Compiled
    models of other families keep that name.
    """
    plain = OptimizedModule._get_name
    if getattr(plain, "names_peri_llama", False):
        return

    def own_name(self: Any) -> str:
        inside = self._orig_mod
        inside = inside.get_base_model() if hasattr(inside, "get_base_model") else inside
        ours = getattr(getattr(inside, "config", None), "model_type", None) == PeriLlamaConfig.model_type
        return str(inside._get_name()) if ours else plain(self)

    own_name.names_peri_llama = True  # type: ignore[attr-defined]
    OptimizedModule._get_name = own_name  # type: ignore[method-assign]


def register_names() -> None:
    """Enter the names; a second time changes nothing."""
    for auto_class, table in _TABLES.items():
        table[PeriLlamaConfig.model_type] = AUTO_MAP[auto_class].split(".")[-1]
    for wrapper, name in _WRAPPED.items():
        _TABLES["AutoModelForCausalLM"][f"{PeriLlamaConfig.model_type}, {wrapper}"] = name


def register_everywhere() -> None:
    """Have every library that asks for a class by its name know this family; a second time changes nothing."""
    register_names()
    name_compiled_models()
    refuse_megatron()
