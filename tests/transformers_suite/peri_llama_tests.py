"""Transformers' common model tests for PeriLlama: one class for each placement and norm, and for some variants.

Run by `make test-hf TRANSFORMERS_SRC=...`, see tests/README.md. The name keeps pytest from collecting it unasked.
`tests` is Transformers' own: conftest.py has seen to that.
"""

import copy
import sys
import unittest
from typing import Any

from model_tester import PeriLlamaModelTester
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_periln import PLACEMENT_NAMES, PeriLlamaConfig

# Their tests give labels to every class with a name in this table; the base model's is there for the Trainer.
del MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["peri_llama, prefix tuning"]

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

from tests import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin  # noqa: E402

# Without this, only the model types on their lists are run in several processes.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None


def _raise_eps(config: PeriLlamaConfig) -> None:
    config.norm_eps = 1.0


# Theirs sets the epsilon under each name that a family may have for it. This family refuses all but its own two when
# the configuration is loaded again: a misspelt field would have no effect.
for _name in ("test_modeling_common", "generation.test_utils", "exporters.test_export"):
    _module = sys.modules[f"tests.{_name}"]
    if hasattr(_module, "set_config_for_less_flaky_test"):
        _module.set_config_for_less_flaky_test = _raise_eps


class CommonTests(test_modeling_common.ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    """Everything that runs in one process. `fields` is what a class of the table sets."""

    fields: dict[str, Any] = {}
    model_tester = None
    _torch_compile_train_cls = PeriLlamaModelTester.causal_lm_class
    test_can_init_all_missing_weights_before_2023 = True  # it takes a file without a licence header for an old one
    # Their defaults suit larger models: the embedding of this one alone is more than half of it.
    model_split_percents = [0.5, 0.8, 0.9]

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = PeriLlamaModelTester(self, self.fields)
        self.all_model_classes = self.model_tester.all_model_classes

    def test_config(self) -> None:
        ConfigTester(
            self, config_class=PeriLlamaModelTester.config_class, **copy.deepcopy(self.fields)
        ).run_common_tests()


class ParallelTests(CommonTests, test_tensor_parallel_mixin.TensorParallelTesterMixin, test_fsdp_mixin.FSDPTesterMixin):
    """And in two processes."""


LAYER_TYPES = ["sliding_attention", "full_attention"]  # of the two layers that these models have
TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
VARIANTS = {
    "SlidingWindow": {"norm_placement": "pre", "sliding_window": 4},
    "SlidingAndFullLayers": {"norm_placement": "output", "qk_norm": "full", "sliding_window": 4},
    "RopeByLayerTypeCentered": {
        "norm_placement": "sandwich",
        "norm_gain": "centered",
        "qk_norm": "head",
        "sliding_window": 4,
        "rope_parameters": TWO_ROPES,
        "query_pre_attn_scalar": 9,
        "embedding_multiplier": 5.5,
        "tie_word_embeddings": True,
    },
    "PartialRotary": {
        "norm_placement": "peri",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    },
    "LayersWithoutRope": {"norm_placement": "output", "qk_norm": "head", "no_rope_layers": [1, 0]},
    "HybridCentered": {"norm_placement": "hybrid", "norm_gain": "centered"},
    "AttentionAndMlpApart": {
        "norm_placement": {
            "attn": {"input_norm": {"kind": "dyt"}, "output_norm": {"gain": "scalar"}, "alpha": {"learned": "channel"}},
            "mlp": {"residual_norm": {"kind": "layernorm"}, "s": {"learned": "scalar", "init": 0.5}, "c": "1/sqrt(2L)"},
            "q_norm": {"over": "head", "kind": "l2"},
            "k_norm": {"over": "full", "gain": "centered"},
            "attn_inner_norm": {"gain": "head"},
            "mlp_inner_norm": {"kind": "derf"},
            "final_norm": True,
        }
    },
    "PeriRmsnormHeadQkTied": {"norm_placement": "peri", "qk_norm": "head", "tie_word_embeddings": True},
    "PostLayernormFullQkEmbedFinal": {
        "norm_placement": "post",
        "norm_type": "layernorm",
        "qk_norm": "full",
        "embedding_norm": True,
        "final_norm": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
}
TABLE = {
    f"{placement.title().replace('_', '')}{norm.title()}": {"norm_placement": placement, "norm_type": norm}
    for placement in PLACEMENT_NAMES
    for norm in ("rmsnorm", "layernorm")
} | VARIANTS
for _name in ("SlidingAndFullLayers", "RopeByLayerTypeCentered", "LayersWithoutRope"):
    # Their test of the configuration alone takes the default number of layers.
    VARIANTS[_name]["num_hidden_layers"] = 2
    if "sliding_window" in VARIANTS[_name]:
        VARIANTS[_name]["layer_types"] = LAYER_TYPES
# Plans differ only in which norms there are, so that a few rows represent all.
PARALLEL = (
    *("PeriRmsnorm", "PostLayernorm", "PeriRmsnormHeadQkTied", "PostLayernormFullQkEmbedFinal"),
    "RopeByLayerTypeCentered",
)

for _name, _fields in TABLE.items():
    _base = ParallelTests if _name in PARALLEL else CommonTests
    _attributes = {"fields": _fields, "__module__": __name__}
    if _fields["norm_placement"] == "output":
        # OLMo 2's placement without its QK-norm learns their sequence too, in 400 of these steps instead of 200.
        _attributes["training_overfit_steps"] = 600
    if _fields["norm_placement"] == "none":
        # Without any norm nothing lifts a stream of 0.02 to the size at which their comparisons see a difference.
        _attributes["fields"] = _fields | {"initializer_range": 0.2}
    globals()[f"{_name}Test"] = type(f"{_name}Test", (_base, unittest.TestCase), _attributes)
