"""The names of this family's classes, in the tables where Transformers keeps its own.

Libraries look a class up by its name to learn what it is, and do something else for an unknown name, most of
them silently: the Trainer's label smoothing does not shift the labels, so that the model learns to copy its
input; lm-eval and the generated model card cannot tell the task; the server does not list the model. The auto classes'
`register` does not reach these tables. They are filled wherever the model is imported, installed or as remote code.
A compiled model has its wrapper's name, and is made to answer by its own.
One library finds a name within ours and would build another architecture: there the family is refused.
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
# The causal LM's name as the Trainer reads it from a wrapped model: FSDP2 renames the class, and for a model with
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
    """Have `torch.compile(model)` answer by the name of this family's model in it, within PEFT's wrapper or not.

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
    """Enter the names; a second call changes nothing."""
    for auto_class, table in _TABLES.items():
        table[PeriLlamaConfig.model_type] = AUTO_MAP[auto_class].split(".")[-1]
    for wrapper, name in _WRAPPED.items():
        _TABLES["AutoModelForCausalLM"][f"{PeriLlamaConfig.model_type}, {wrapper}"] = name


def register_everywhere() -> None:
    """Have every library that asks for a class by its name know this family; a second call changes nothing."""
    register_names()
    name_compiled_models()
    refuse_megatron()
