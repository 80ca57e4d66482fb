# SPDX-License-Identifier: Apache-2.0
"""Families whose files hold q, k and v, or gate and up, as one matrix (Phi-3): split where they are read, so that all
that follows sees one tensor a projection. The checkpoint keeps them apart; vLLM fuses them itself when it loads."""

from __future__ import annotations

import torch

from calibrate.models import GATE_UP, QKV, Dims
from vllm_comet.checkpoint import ACT_BITS_NAME, INPUT_PERM

FUSED = {"self_attn.qkv_proj": QKV.members, "mlp.gate_up_proj": GATE_UP.members}


def _rows(fused: str, dims: Dims) -> tuple[int, ...]:
    """Output channels of each part of ``fused``."""
    return dims.rows(GATE_UP if fused == "mlp.gate_up_proj" else QKV)


def split_tensors(tensors: dict[str, torch.Tensor], dims: Dims) -> dict[str, torch.Tensor]:
    """Tensors by name, each of a fused linear (its first dimension: output channels) cut into its parts."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        fused = next((f for f in FUSED if module.endswith(f)), None)
        if fused is None:
            result[name] = tensor
            continue
        base = module.removesuffix(fused)
        pieces = tensor.split(_rows(fused, dims))
        result |= {f"{base}{part}.{kind}": piece for part, piece in zip(FUSED[fused], pieces, strict=True)}
    return result


def split_module(layer: torch.nn.Module, dims: Dims) -> None:
    """Replace the fused linears of a decoder layer (on the meta device) by one for each part."""
    for fused, parts in FUSED.items():
        parent_name, _, name = fused.rpartition(".")
        whole = layer.get_submodule(fused)
        for part, rows in zip(parts, _rows(fused, dims), strict=True):
            linear = torch.nn.Linear(whole.in_features, rows, whole.bias is not None, device="meta")
            layer.set_submodule(part, linear)
        delattr(layer.get_submodule(parent_name), name)


def merge_stored(layers: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    """The stored tensors of a model, by linear and suffix, with the parts of fused linears put together again."""
    result = dict(layers)
    for fused, parts in FUSED.items():
        for first in [name for name in layers if name.endswith(f".{parts[0]}")]:
            base = first.removesuffix(parts[0])
            pieces = [result.pop(base + part) for part in parts]
            shared = {s: t for s, t in pieces[0].items() if s in (INPUT_PERM, ACT_BITS_NAME)}
            result[base + fused] = shared | {s: torch.cat([p[s] for p in pieces]) for s in pieces[0] if s not in shared}
    return result
