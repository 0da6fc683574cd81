"""What Transformers' common tests ask of a family: its classes, a tiny configuration, and its inputs."""

import copy
from typing import Any

import torch
from transformers.testing_utils import torch_device

from modeling_periln import (
    PeriLlamaConfig,
    PeriLlamaForCausalLM,
    PeriLlamaForQuestionAnswering,
    PeriLlamaForSequenceClassification,
    PeriLlamaForTokenClassification,
    PeriLlamaModel,
)

# Grouped-query attention. Their parallel tests want sizes that two processes divide unevenly, too: 99 and 37.
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class PeriLlamaModelTester:
    """Their tests read these attributes; `fields` are those of the configuration under test."""

    config_class = PeriLlamaConfig
    base_model_class = PeriLlamaModel
    causal_lm_class = PeriLlamaForCausalLM
    sequence_classification_class = PeriLlamaForSequenceClassification
    token_classification_class = PeriLlamaForTokenClassification
    question_answering_class = PeriLlamaForQuestionAnswering
    is_training = True
    batch_size = 13
    seq_length = 7
    num_labels = 3

    def __init__(self, parent: Any, fields: dict[str, Any]):
        self.parent = parent
        self.fields = fields
        for name, size in SIZES.items():
            setattr(self, name, size)

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        return (
            self.base_model_class,
            self.causal_lm_class,
            self.sequence_classification_class,
            self.token_classification_class,
            self.question_answering_class,
        )

    def get_config(self) -> PeriLlamaConfig:
        return PeriLlamaConfig(**SIZES | {"num_labels": self.num_labels} | copy.deepcopy(self.fields))

    def prepare_config_and_inputs_for_common(self) -> tuple[PeriLlamaConfig, dict[str, torch.Tensor]]:
        """The configuration and a batch (B, S); row i sees its first i + 1 tokens, the rest is padding."""
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}
