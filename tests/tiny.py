# SPDX-License-Identifier: Apache-2.0
"""A tiny random COMET checkpoint of the Llama family, written straight in the format (no calibrator involved)."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from vllm_comet import checkpoint as ck

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "attention_bias": False, "mlp_bias": False,
}
INPUTS = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Layers that share an input share its permutation and block precisions."""


def linear(n: int, k: int, fmt: ck.CometFormat, shared: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random tensors of one layer whose weights have standard deviation about 1/sqrt(k)."""
    codes = torch.randint(0, 16, (n, k))
    tensors = {ck.WEIGHT_PACKED: ck.pack_int4(codes), ck.WEIGHT_SCALE: torch.rand(n) * 0.02 / k**0.5 + 0.01 / k**0.5}
    if fmt.group_size != -1:
        groups = ck.num_groups(k, fmt.group_size)
        tensors[ck.WEIGHT_GROUP_SCALE] = torch.randint(8, 17, (n, groups), dtype=torch.uint8)
    return tensors | {name: value.clone() for name, value in shared.items()}


def input_order(k: int, slices: int, share: float, with_perm: bool) -> dict[str, torch.Tensor]:
    """A random permutation inside ``slices`` parts of k, and block precisions with INT8 last in each part."""
    width = k // slices
    blocks = ck.num_blocks(width)
    bits = torch.full((slices, blocks), 4, dtype=torch.uint8)
    bits[:, blocks - max(1, round(share * blocks)):] = 8
    order = {ck.ACT_BITS_NAME: bits.flatten()}
    if with_perm:
        order[ck.INPUT_PERM] = torch.cat([torch.randperm(width) + s * width for s in range(slices)]).to(torch.int32)
    return order


def write(directory: Path, group_size: int = 64, kv_group_size: int | None = 64, slices: int = 2, seed: int = 0,
          k_offset: bool = True, **changes: object) -> Path:
    """Write a checkpoint into ``directory`` (made if need be); ``changes`` override entries of the model config."""
    torch.manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    kv = None if kv_group_size is None else ck.KVCacheFormat(kv_group_size, k_offset=k_offset)
    fmt = ck.CometFormat(group_size=group_size, kv_cache=kv, tensor_parallel=slices)
    config = CONFIG | changes
    hidden, ff, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv_rows = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(config["vocab_size"], hidden, dtype=torch.bfloat16) / hidden**0.5,
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        orders = {"qkv": input_order(hidden, 1, 0.3, True), "gate_up": input_order(hidden, 1, 0.3, True),
                  "o_proj": input_order(q, slices, 0.3, True), "down_proj": input_order(ff, slices, 0.3, False)}
        shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv_rows, hidden),
                  "self_attn.v_proj": (kv_rows, hidden), "self_attn.o_proj": (hidden, q),
                  "mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden), "mlp.down_proj": (hidden, ff)}
        for name, (rows, k) in shapes.items():
            last = name.split(".")[1]
            parts = linear(rows, k, fmt, orders[INPUTS.get(last, last)])
            tensors |= {f"{base}.{name}.{suffix}": value for suffix, value in parts.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        if kv is not None and kv.k_offset:
            offset = torch.randn(config["num_key_value_heads"], dim, generator=torch.Generator().manual_seed(layer))
            tensors[f"{base}.self_attn.{ck.K_OFFSET}"] = offset
    ck.save_shard(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": fmt.to_dict()}))
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges (256 bytes and two special tokens) and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(directory)
