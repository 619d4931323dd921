"""transformers' own tests of a model, on ours: `make hf-tests TRANSFORMERS=CHECKOUT` puts the checkout's `tests` on the path."""

import unittest

import pytest
from transformers.models.auto import modeling_auto

try:
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_configuration_common import ConfigTester
    from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("tests"):
        raise
    pytest.skip("transformers' tests are not on the path: make hf-tests TRANSFORMERS=CHECKOUT", allow_module_level=True)

from palm_kernels.models import (
    PaLMConfig,
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForQuestionAnswering,
    PaLMForSequenceClassification,
    PaLMForTokenClassification,
    PaLMModel,
)

for names, model in (  # the common tests know heads by the names in these tables
    (modeling_auto.MODEL_MAPPING_NAMES, PaLMModel),
    (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, PaLMForCausalLM),
    (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, PaLMForMaskedLM),
    (modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, PaLMForTokenClassification),
    (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, PaLMForSequenceClassification),
    (modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, PaLMForQuestionAnswering),
):
    names["palm"] = model.__name__


class Tester:
    """What the common tests ask of a model's tester: sizes, a config, inputs."""

    batch_size, seq_length, is_training = 5, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads, num_labels = 99, 32, 2, 4, 3
    causal_lm_class, base_model_class = PaLMForCausalLM, PaLMModel

    def __init__(self, attention: str):
        self.attention = attention

    def get_config(self):
        return PaLMConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_labels=self.num_labels,
            attention=self.attention,
            tie_word_embeddings=False,
        )

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        return self.get_config(), {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "attention_mask": random_attention_mask(shape),
        }


class Common(ModelTesterMixin):
    attention = "bidirectional"
    has_attentions = False  # the kernels never hold the attention matrix

    def setUp(self):
        self.model_tester = Tester(self.attention)
        self.config_tester = ConfigTester(self, config_class=PaLMConfig, hidden_size=32)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(
        "it asks for a warning when a cache is given as past_key_values: ours takes both names, as versions before do"
    )
    def test_bc_cache_name_forward(self):
        pass


class PaLMDecoderTest(Common, GenerationTesterMixin, unittest.TestCase):
    attention = "causal"
    all_model_classes = (PaLMModel, PaLMForCausalLM, PaLMForTokenClassification, PaLMForSequenceClassification)

    def test_left_padding_compatibility(self):
        self.has_attentions = True  # it is left out where there are none
        super().test_left_padding_compatibility()


class PaLMEncoderTest(Common, unittest.TestCase):
    all_model_classes = (
        PaLMModel,
        PaLMForMaskedLM,
        PaLMForTokenClassification,
        PaLMForSequenceClassification,
        PaLMForQuestionAnswering,
    )
