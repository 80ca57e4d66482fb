# SPDX-License-Identifier: Apache-2.0
"""A GGUF file becomes a Hugging Face folder with the same logits and a tokenizer that splits digits."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from calibrate_tiny import tiny_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate.errors import CalibrationError
from calibrate.loading import open_model

_NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def interleave_rope(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF's Llama stores rotary pairs side by side, Hugging Face half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: torch.nn.Module, pre: str, add_bos: bool, words: tuple[str, ...] = ()) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", *words]
    tokens += [f"<{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(add_bos)
    writer.add_eos_token_id(1)
    for name, parameter in model.named_parameters():
        base = name.removeprefix("model.").removesuffix(".weight")
        if base.startswith("layers."):
            _, index, module = base.split(".", 2)
            target = f"blk.{index}.{_NAMES[module]}"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[base]
        if base.endswith("q_proj") or base.endswith("k_proj"):
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            parameter = interleave_rope(parameter, heads)
        writer.add_tensor(f"{target}.weight", parameter.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("pre", "pieces", "add_bos"), [("smollm", ["1", "2"], False), ("gpt-2", ["12"], True)])
def test_gguf_becomes_an_equal_hugging_face_folder(tmp_path, pre, pieces, add_bos):
    model = tiny_model("Llama")
    write_gguf(tmp_path / "tiny.gguf", model, pre, add_bos)
    tokens = torch.arange(2, 40).unsqueeze(0)
    with open_model(str(tmp_path / "tiny.gguf")) as source, torch.no_grad():
        assert source.config().architectures == ["LlamaForCausalLM"]
        found = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32)(tokens).logits
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)
        tokenizer = AutoTokenizer.from_pretrained(source.directory)
        assert tokenizer.tokenize("12") == pieces
        assert (tokenizer("12")["input_ids"][0] == tokenizer.bos_token_id) == add_bos
        folder = source.directory
    assert not folder.exists()


def test_tokenizer_that_splits_its_own_words_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("Llama"), "gpt-2", False, words=("Ġbrown", "Ġquick"))  # no merges
    with pytest.raises(CalibrationError, match=r"it splits 2 of 2 words that are tokens, such as 'brown'"), open_model(
        str(tmp_path / "tiny.gguf")):
        pass


def test_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(CalibrationError, match="bad.gguf is not a readable GGUF file"), open_model(
        str(tmp_path / "bad.gguf")):
        pass
