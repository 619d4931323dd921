"""PaLM for Hugging Face transformers: importing this package registers it with the Auto classes."""

import transformers as _hf

from . import convert
from .configuration import PaLMConfig
from .generation import SharedPrefix
from .heads import (
    PaLMForCausalLM,
    PaLMForMaskedLM,
    PaLMForQuestionAnswering,
    PaLMForSequenceClassification,
    PaLMForTokenClassification,
)
from .modeling import PaLMModel, PaLMPreTrainedModel
from .tokenization import PaLMTokenizer

__all__ = [
    "PaLMConfig",
    "PaLMForCausalLM",
    "PaLMForMaskedLM",
    "PaLMForQuestionAnswering",
    "PaLMForSequenceClassification",
    "PaLMForTokenClassification",
    "PaLMModel",
    "PaLMPreTrainedModel",
    "PaLMTokenizer",
    "SharedPrefix",
    "convert",
]

_hf.AutoConfig.register("palm", PaLMConfig, exist_ok=True)
_hf.AutoTokenizer.register(PaLMConfig, fast_tokenizer_class=PaLMTokenizer, exist_ok=True)
for _auto, _model in (
    (_hf.AutoModel, PaLMModel),
    (_hf.AutoModelForCausalLM, PaLMForCausalLM),
    (_hf.AutoModelForMaskedLM, PaLMForMaskedLM),
    (_hf.AutoModelForTokenClassification, PaLMForTokenClassification),
    (_hf.AutoModelForSequenceClassification, PaLMForSequenceClassification),
    (_hf.AutoModelForQuestionAnswering, PaLMForQuestionAnswering),
):
    _auto.register(PaLMConfig, _model, exist_ok=True)
