"""The names of this family's classes, in the tables where Transformers keeps those of its own.

Libraries look a class up by its name to learn what it is, and do something else for a name that is not there, most of
them without a word: the Trainer's label smoothing does not shift the labels, so that the model learns to copy its
input; lm-eval and the generated model card cannot tell the task; the server does not list the model. The auto classes'
`register` does not reach these tables. They are filled wherever the model is imported, installed or as remote code.
"""

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


def register_names() -> None:
    """Enter the names; a second time changes nothing."""
    for auto_class, table in _TABLES.items():
        table[PeriLlamaConfig.model_type] = AUTO_MAP[auto_class].split(".")[-1]
    for wrapper, name in _WRAPPED.items():
        _TABLES["AutoModelForCausalLM"][f"{PeriLlamaConfig.model_type}, {wrapper}"] = name
