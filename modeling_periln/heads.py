"""Transformers' generic heads on this family's base model.

Their own `__init__` asks AutoModel for the base model, and AutoModel does not know a family that was loaded as remote
code: hence these, which build the same modules under the same names from the class's `base`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_utils import PreTrainedModel


class SequenceClassification(GenericForSequenceClassification):
    base: Callable[[Any], nn.Module]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = type(self).base(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class TokenClassification(GenericForTokenClassification):
    base: Callable[[Any], nn.Module]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = type(self).base(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class QuestionAnswering(GenericForQuestionAnswering):
    base: Callable[[Any], nn.Module]

    def __init__(self, config: Any):
        PreTrainedModel.__init__(self, config)
        self.model = type(self).base(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
