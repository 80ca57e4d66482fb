# SPDX-License-Identifier: Apache-2.0
"""One decoder layer in stages, so that each linear sees its input as the already quantised ones before it produce it.

The maths is Hugging Face's (its norm, rotary and activation modules are used as they are); only the order of calls is
spelled out here, because the library's ``forward`` can't be stopped between two linears. What passes through the
linears has the builder's ``dtype``, norms are float32, and the residual stream ("hidden") has ``hidden_dtype``.
Activations are ``[B, T, channels]``.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig

from calibrate.errors import CalibrationError
from calibrate.fused import split_module
from calibrate.models import Dims, Family, layer_type
from vllm_comet.kernels.kv4_cache import dequantize_kv_ref, quantize_kv_ref


def round_trip_kv(x: torch.Tensor, group_size: int, offset: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` ``[..., heads, T, D]`` as the 4-bit cache returns it, in x's dtype: without ``offset`` ``[heads, D]``."""
    stored = x if offset is None else x.to(torch.float32) - offset.unsqueeze(-2)
    return dequantize_kv_ref(*quantize_kv_ref(stored, group_size)).to(x.dtype)


class DecoderBuilder:
    """Makes decoder layers of a config without allocating the model."""

    def __init__(self, config: PretrainedConfig, family: Family, device: torch.device, dtype: torch.dtype):
        config = copy.deepcopy(config)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config).model
        self.config, self.family, self.device, self.dtype = config, family, device, dtype
        self.hidden_dtype = torch.float32 if device.type == "cpu" else dtype  # off a CPU they are stored and moved
        self._layer_class = type(model.layers[0])
        self._rotary = type(model.rotary_emb)(config).to(device)
        self.apply_rotary = sys.modules[self._layer_class.__module__].apply_rotary_pos_emb

    def skeleton(self, index: int) -> torch.nn.Module:
        """Layer ``index`` without values."""
        with torch.device("meta"):
            layer = self._layer_class(self.config, index)
        if self.family.fused:
            split_module(layer, Dims.of(self.config))
        return layer

    def build(self, index: int, tensors: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> DecoderLayer:
        """Layer ``index`` from all of its float tensors, names relative to the layer; ``dtype``: of its matrices."""
        module = self.skeleton(index)
        state = {name: tensor.to(self.device).to(dtype if tensor.dim() == 2 else torch.float32, copy=True)
                 for name, tensor in tensors.items()}
        try:
            module.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise CalibrationError(f"layer {index} of the model's files does not fit its config.json: "
                                   f"{' '.join(str(error).split()).partition(': ')[2]}") from None
        return DecoderLayer(module.eval().requires_grad_(False), self, index)

    def embed(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[B, T, hidden]`` of int64 ``tokens``, on the device."""
        hidden = F.embedding(tokens, weight).to(self.device).to(torch.float32)
        scaled = hidden * self.config.hidden_size**0.5 if self.family.scaled_embedding else hidden
        return scaled.to(self.hidden_dtype)

    def rotary(
        self, hidden: torch.Tensor, index: int, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of RoPE in ``hidden``'s dtype, at ``positions`` ``[T]`` or, without them, at its tokens."""
        positions = torch.arange(hidden.shape[1], device=hidden.device) if positions is None else positions
        positions = positions.unsqueeze(0)
        if self.family.scaled_embedding:  # Gemma 3 has one RoPE base per layer type
            return self._rotary(hidden, positions, layer_type(self.config, index))
        return self._rotary(hidden, positions)


class DecoderLayer:
    """The stages of one layer, in the order they run."""

    def __init__(self, module: torch.nn.Module, builder: DecoderBuilder, index: int):
        self.module, self.attn, self.mlp = module, module.self_attn, module.mlp
        self.builder, self.index = builder, index
        self._activation = self.mlp.activation_fn if builder.family.fused else self.mlp.act_fn
        self.family, self.dims = builder.family, Dims.of(builder.config)
        sliding = layer_type(builder.config, index) == "sliding_attention"
        self.window: int | None = builder.config.sliding_window if sliding else None

    def linear(self, name: str) -> torch.nn.Linear:
        return self.module.get_submodule(name)

    def _apply(self, name: str, x: torch.Tensor) -> torch.Tensor:
        linear = self.linear(name)
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, linear.weight.to(x.dtype), bias)

    def attention_input(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.module.input_layernorm(hidden.to(torch.float32)).to(self.builder.dtype)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k (after RoPE) and v, ``[B, heads, T, head_dim]``."""
        shape = (*x.shape[:2], -1, self.dims.head_dim)
        q, k, v = (self._apply(f"self_attn.{n}_proj", x).view(shape) for n in "qkv")
        if self.family.qk_norm:
            q, k = self.attn.q_norm(q).to(x.dtype), self.attn.k_norm(k).to(x.dtype)
        q, k = self.builder.apply_rotary(q.transpose(1, 2), k.transpose(1, 2), *self.builder.rotary(x, self.index))
        return q, k, v.transpose(1, 2)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The input of o_proj ``[B, T, heads · head_dim]``."""
        length = q.shape[2]
        mask = None
        if self.window is not None and length > self.window:
            distance = torch.arange(length, device=q.device).unsqueeze(1) - torch.arange(length, device=q.device)
            mask = (distance >= 0) & (distance < self.window)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=self.attn.scaling,
                                             enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def add_attention(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        out = self._apply("self_attn.o_proj", attended).to(torch.float32)
        return self._add(hidden, self.module.post_attention_layernorm(out) if self.family.sandwich_norm else out)

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        norm = "pre_feedforward_layernorm" if self.family.sandwich_norm else "post_attention_layernorm"
        return self.module.get_submodule(norm)(hidden.to(torch.float32)).to(self.builder.dtype)

    def mlp_hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The input of down_proj."""
        return self._activation(self._apply("mlp.gate_proj", x)) * self._apply("mlp.up_proj", x)

    def add_mlp(self, hidden: torch.Tensor, activated: torch.Tensor) -> torch.Tensor:
        out = self._apply("mlp.down_proj", activated).to(torch.float32)
        return self._add(hidden, self.module.post_feedforward_layernorm(out) if self.family.sandwich_norm else out)

    @staticmethod
    def _add(hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return (hidden + out).to(hidden.dtype)

    def attended(self, hidden: torch.Tensor) -> torch.Tensor:
        """The input of o_proj from the layer's input."""
        return self.attention(*self.qkv(self.attention_input(hidden)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.add_attention(hidden, self.attended(hidden))
        return self.add_mlp(hidden, self.mlp_hidden(self.mlp_input(hidden)))
