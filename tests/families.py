"""Tiny models of many families, with random weights in which nothing is trivially zero or one.

Every config is as small as its family allows. Sliding windows are 4 tokens, so that ordinary test pairs outlast them.
"""

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
CONTEXT = 32
WINDOW = 4

#: Inside the vocabulary, or transformers warns.
SPECIAL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

#: Names of configs that date from before Llama.
OLD = SPECIAL | {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GPT = SPECIAL | {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT}
#: Names of configs since.
NEW = OLD | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}
SLIDING = NEW | {"sliding_window": WINDOW}

#: Models that take a 4-D mask and positions as they are, and so the shared layout.
TREE_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "gpt2": (tf.GPT2Config, GPT),
    "gptj": (tf.GPTJConfig, GPT | {"rotary_dim": 4}),
    "gpt-neox": (tf.GPTNeoXConfig, OLD | {"intermediate_size": 64, "max_position_embeddings": CONTEXT}),
    "opt": (tf.OPTConfig, OLD | {"ffn_dim": 64, "max_position_embeddings": CONTEXT, "word_embed_proj_dim": 32}),
    "phi": (tf.PhiConfig, NEW),
    "llama": (tf.LlamaConfig, NEW),
    "qwen2": (tf.Qwen2Config, NEW),
    "qwen2-sliding": (tf.Qwen2Config, SLIDING | {"use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": (tf.Qwen3Config, NEW | {"head_dim": 8}),
    "olmo2": (tf.Olmo2Config, NEW),
    "granite": (tf.GraniteConfig, NEW | {"logits_scaling": 3.0}),
    "cohere": (tf.CohereConfig, NEW),
    "gemma2": (tf.Gemma2Config, SLIDING | {"head_dim": 8, "final_logit_softcapping": 1.0}),
    "gemma3": (tf.Gemma3TextConfig, SLIDING | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": (tf.MistralConfig, SLIDING),
    "mixtral": (tf.MixtralConfig, NEW | {"num_local_experts": 4}),
    "falcon-rope": (tf.FalconConfig, OLD | {"alibi": False}),
}

#: Models that read distance from the index (ALiBi) or have no mask (state-space models).
PADDED_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "bloom": (tf.BloomConfig, SPECIAL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": (tf.MptConfig, SPECIAL | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT}),
    "falcon-alibi": (tf.FalconConfig, OLD | {"alibi": True}),
    "mamba": (tf.MambaConfig, SPECIAL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
}

#: A model whose window is measured in row indices, with no option to tell it otherwise.
INDEX_WINDOW_FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict]] = {
    "gpt-neo": (
        tf.GPTNeoConfig,
        SPECIAL
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": CONTEXT}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    ),
}

FAMILIES = TREE_FAMILIES | PADDED_FAMILIES | INDEX_WINDOW_FAMILIES


def tiny_model(
    family: str, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None, **options: object
) -> PreTrainedModel:
    """A model of `family` in evaluation mode, the same weights at every call; `options` override its config."""
    cls, arguments = FAMILIES[family]
    chosen = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(cls(**(arguments | options)), **chosen)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases begin at zero and norms at one, where a mistake in either would not show.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()
