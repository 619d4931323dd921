"""PaLM for Hugging Face transformers: importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from .configuration import PaLMConfig
from .modeling import PaLMForCausalLM, PaLMForTokenClassification, PaLMModel, PaLMPreTrainedModel
from .tokenization import PaLMTokenizer

__all__ = [
    "PaLMConfig",
    "PaLMForCausalLM",
    "PaLMForTokenClassification",
    "PaLMModel",
    "PaLMPreTrainedModel",
    "PaLMTokenizer",
]

AutoConfig.register("palm", PaLMConfig, exist_ok=True)
AutoModel.register(PaLMConfig, PaLMModel, exist_ok=True)
AutoModelForCausalLM.register(PaLMConfig, PaLMForCausalLM, exist_ok=True)
AutoModelForTokenClassification.register(PaLMConfig, PaLMForTokenClassification, exist_ok=True)
AutoTokenizer.register(PaLMConfig, fast_tokenizer_class=PaLMTokenizer, exist_ok=True)
