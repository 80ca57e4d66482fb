# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face model that computes what a COMET checkpoint means, with the plain-torch references.

Slow and independent of vLLM: used to measure accuracy, and by tests as the model that the served one must agree with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from calibrate.decoder import round_trip_kv
from calibrate.fmpq import segments
from calibrate.fused import merge_stored
from calibrate.grid import dequantize
from calibrate.loading import ModelSource
from calibrate.models import FAMILIES
from calibrate.stats import products_of_bf16
from vllm_comet import checkpoint as fmt
from vllm_comet.kernels.act_quant import quantize_activation_ref
from vllm_comet.kernels.w4ax_gemm import scaled_sums

Activations = Literal["none", "int8", "mixed"]


class CometLinear(torch.nn.Module):
    """A linear layer that quantises its input in two segments and multiplies integers: what ``w4ax_gemm_ref`` defines,
    bit for bit, without its float64.

    tensors: the stored tensors by suffix. activations ``int8`` or ``mixed``: precision of the INT4 blocks.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, group_size: int,
                 activations: Activations):
        super().__init__()
        weight = fmt.integer_weight(tensors[fmt.WEIGHT_PACKED], tensors.get(fmt.WEIGHT_GROUP_SCALE), group_size)
        order, self.split = segments(tensors[fmt.ACT_BITS_NAME], weight.shape[1])
        perm = tensors.get(fmt.INPUT_PERM)
        self.low_bits = 8 if activations == "int8" else 4
        self.register_buffer("weight", weight[:, order])
        self.register_buffer("weight_scale", tensors[fmt.WEIGHT_SCALE])
        self.register_buffer("perm", order if perm is None else perm.to(torch.int64)[order])
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scales = quantize_activation_ref(x.flatten(0, -2), self.perm, self.split, self.low_bits)
        low = _integer_matmul(codes[:, : self.split], self.weight[:, : self.split])
        high = _integer_matmul(codes[:, self.split :], self.weight[:, self.split :])
        y = scaled_sums(low, high, scales, two=self.split < codes.shape[1]) * self.weight_scale
        if self.bias is not None:
            y = y + self.bias.to(torch.float32)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def _integer_matmul(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``a wᵀ`` of int8 ``[M, K]`` and ``[N, K]`` in int32; exact, for 1024 products stay below 2**24."""
    if a.device.type == "cuda" and a.shape[0] > 16 and a.shape[1] % 8 == 0 < a.shape[1] and w.shape[0] % 8 == 0:
        return torch._int_mm(a.contiguous(), w.contiguous().T)
    total = torch.zeros(a.shape[0], w.shape[0], dtype=torch.int32, device=a.device)
    with products_of_bf16():
        for x, y in zip(a.split(1024, dim=1), w.split(1024, dim=1), strict=True):
            total += (x.to(torch.float32) @ y.to(torch.float32).T).to(torch.int32)
    return total


def load_comet(
    directory: Path | str, activations: Activations = "int8", kv4: bool = True, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The model of a COMET checkpoint as a Hugging Face causal LM in ``dtype``, ready for ``forward`` and ``generate``.

    activations: ``none`` multiplies by the dequantised weights, ``int8`` and ``mixed`` run the integer reference.
    kv4: attention reads K and V from the 4-bit cache, if the checkpoint has one calibrated.
    """
    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    comet = fmt.CometFormat.from_dict(config.quantization_config)
    del config.quantization_config
    plain, layers = read_tensors(directory)
    offsets = {name: plain.pop(name) for name in list(plain) if name.endswith(f".{fmt.K_OFFSET}")}
    if FAMILIES[config.architectures[0]].fused:
        layers = merge_stored(layers)
    state = plain | {f"{name}.weight": dequantize(stored, comet.group_size) for name, stored in layers.items()}
    attention = kv4_attention(comet.kv_cache.group_size) if kv4 and comet.kv_cache else "sdpa"
    model_class = getattr(transformers, config.architectures[0])
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype,
                                        attn_implementation=attention)
    for name, offset in offsets.items():
        model.get_submodule(name.rpartition(".")[0]).register_buffer(fmt.K_OFFSET, offset)
    if activations != "none":
        for name, stored in layers.items():
            bias = model.get_submodule(name).bias
            model.set_submodule(name, CometLinear(stored, bias, comet.group_size, activations))
    return model.eval().requires_grad_(False)


def load_base(directory: Path | str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unquantised model, for comparison."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval().requires_grad_(False)


def read_tensors(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """A checkpoint's plain tensors by name, and the stored ones of every quantised linear by layer name and suffix."""
    source = ModelSource(directory)
    plain: dict[str, torch.Tensor] = {}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name in source.names:
        layer, _, suffix = name.rpartition(".")
        if suffix in fmt.COMET_SUFFIXES:
            layers.setdefault(layer, {})[suffix] = source.tensor(name)
        else:
            plain[name] = source.tensor(name)
    return plain, layers


def kv4_attention(group_size: int) -> str:
    """Register (once) an attention that sees K and V as the 4-bit cache returns them; returns its name."""
    name = f"comet_kv4_g{group_size}"

    def forward(module, query, key, value, attention_mask, **kwargs):
        key = round_trip_kv(key, group_size, getattr(module, fmt.K_OFFSET, None))
        value = round_trip_kv(value, group_size)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation of ``prompt``: token ids, and the float32 logits ``[tokens, vocab]`` each was chosen from."""
    ids, logits = list(prompt), []
    past = None
    feed = torch.tensor([ids])
    for _ in range(tokens):
        out = model(feed, past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits.append(out.logits[0, -1].to(torch.float32))
        ids.append(int(logits[-1].argmax()))
        feed = torch.tensor([[ids[-1]]])
    return ids[len(prompt):], torch.stack(logits)
