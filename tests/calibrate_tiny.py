# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every supported family, saved as Hugging Face folders, for the calibrator's tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Gemma3")
VOCAB = 320
_COMMON = dict(vocab_size=VOCAB, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=32, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
               pad_token_id=1)
_EXTRA = {"Mistral": dict(sliding_window=24), "Gemma3": dict(sliding_window=24, query_pre_attn_scalar=32),
          "Qwen2": dict(tie_word_embeddings=False), "Phi3": dict(sliding_window=24)}


ROPES = {
    "Llama-3.1": ("Llama", dict(hidden_size=128, rope_parameters=dict(
        rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "Phi-4-mini": ("Phi3", dict(
        hidden_size=128, max_position_embeddings=1024, original_max_position_embeddings=256, rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, original_max_position_embeddings=256,
            short_factor=[1.0 + i / 16 for i in range(12)], long_factor=[2.0 + i for i in range(12)]))),
}
"""Models whose rotary embedding is not the plain one: family and changes of its tiny config."""


def tiny_model(family: str, **changes) -> PreTrainedModel:
    """A float32 model whose norms, biases and K channels are far from their initial values."""
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**_COMMON, **_EXTRA.get(family, {}), **changes})
    config.initializer_range = 0.08
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    for layer in model.model.layers:
        layer.input_layernorm.weight[7] += 8  # an outlier channel in x
        q, k = query_and_key(layer.self_attn, config)
        k[5] *= 6  # and one in K
        q[5] /= 6
    for parameter in model.parameters():  # not model.to(bfloat16), which would round RoPE's frequencies too
        parameter.copy_(parameter.to(torch.bfloat16))
    return model


def query_and_key(attention: torch.nn.Module, config) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the weights of both projections."""
    if not hasattr(attention, "qkv_proj"):
        return attention.q_proj.weight, attention.k_proj.weight
    q, k, _ = attention.qkv_proj.weight.split([attention.head_dim * n for n in (
        config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)])
    return q, k


def save_tiny(directory: Path, family: str, **changes) -> Path:
    """Save it in bf16 with a byte-level tokenizer."""
    tiny_model(family, **changes).to(torch.bfloat16).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


def write_text(path: Path, words: int = 600) -> Path:
    """Words of random letters: enough structure for a Hessian of full rank."""
    letters = random.Random(0)
    path.write_text(" ".join("".join(letters.choices("abcdefghijklmnop", k=letters.randint(1, 9)))
                             for _ in range(words)))
    return path
