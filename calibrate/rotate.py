# SPDX-License-Identifier: Apache-2.0
"""Exact rotations of a model's weights that spread outlier channels, for ``--rotate``; nothing is left at run time.

- ``heads``: v_proj's rows of every KV head times H, o_proj's columns of every head times H. V meets the 4-bit cache,
  and its weighted sums the INT4 blocks of o_proj, in the turned basis. Any family.
- ``all``: also the residual stream, h' = h R (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024). RMSNorm
  commutes with a rotation once its weight has moved into the linears that read it, so embedding, head and every linear
  take up R and a tied head is untied. Where a norm with a weight stands between a linear and the residual stream
  (Gemma 3), no rotation of the stream is exact, and ``all`` is refused.

H and R are Hadamard matrices of the largest power of two in their size, with random signs, times a random orthogonal
matrix of what is left.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PretrainedConfig

from calibrate.errors import CalibrationError
from calibrate.loading import ModelSource
from calibrate.models import Dims, family_of

Rotation = Literal["none", "heads", "all"]
_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_READERS = {"input_layernorm": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
            "post_attention_layernorm": ("gate_proj", "up_proj", "gate_up_proj")}
_WRITERS = ("o_proj", "down_proj")


def rotation_matrix(size: int, seed: int) -> torch.Tensor:
    """Orthogonal float64 ``[size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < power:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    odd, _ = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return signs.unsqueeze(1) * torch.kron(odd.contiguous(), matrix)


class RotatedSource(ModelSource):
    """The rotated model, with the interface of the folder it comes from; each tensor is rotated when it is read."""

    def __init__(self, source: ModelSource, rotation: Rotation, seed: int):
        """Raises CalibrationError where ``rotation`` would change what the model computes."""
        super().__init__(source.directory)
        config = super().config()
        self.family, self.dims, self.rotation = family_of(config), Dims.of(config), rotation
        if rotation == "all" and self.family.sandwich_norm:
            raise CalibrationError(
                f"--rotate all: {self.family.name} has norms with weights between its linears and the residual stream, "
                "so rotating the stream would change the model; use --rotate heads.")
        self._tied = bool(config.tie_word_embeddings)
        self._head = rotation_matrix(self.dims.head_dim, seed)
        self._stream = rotation_matrix(self.dims.hidden, seed + 1) if rotation == "all" else None

    @property
    def names(self) -> list[str]:
        names = super().names
        return names if self._stream is None else sorted({*names, _HEAD})

    def config(self) -> PretrainedConfig:
        config = super().config()
        if self._stream is not None:
            config.tie_word_embeddings = False
        return config

    def shape(self, name: str) -> tuple[int, ...]:
        return super().shape(_EMBEDDING if name == _HEAD and self._tied else name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, rotated: float32, or bf16 for embedding and head, as they are stored."""
        tensor = super().tensor(_EMBEDDING if name == _HEAD and self._tied else name)
        module, _, kind = name.rpartition(".")
        layer, _, linear = module.rpartition(".")
        if self._stream is not None:
            tensor = self._turn_stream(name, layer, linear, tensor)
        if linear in ("v_proj", "qkv_proj"):
            tensor = self._turn_values(tensor)
        elif linear == "o_proj" and kind == "weight":
            blocks = tensor.to(torch.float64).unflatten(1, (-1, self.dims.head_dim))
            tensor = (blocks @ self._head).flatten(1).to(torch.float32)
        return tensor

    def _turn_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """v's output channels, the last of a fused qkv, of weight ``[N, K]`` or bias ``[N]``."""
        rows = self.dims.kv_heads * self.dims.head_dim
        values = tensor[-rows:].to(torch.float64).unflatten(0, (-1, self.dims.head_dim))
        turned = torch.einsum("hd...,de->he...", values, self._head).flatten(0, 1)
        return torch.cat([tensor[:-rows].to(torch.float32), turned.to(torch.float32)])

    def _turn_stream(self, name: str, layer: str, linear: str, tensor: torch.Tensor) -> torch.Tensor:
        assert self._stream is not None
        if name == _EMBEDDING:
            return (tensor.to(torch.float64) @ self._stream).to(torch.bfloat16)
        if name == _HEAD:
            return (tensor.to(torch.float64) * self._gain(_FINAL_NORM) @ self._stream).to(torch.bfloat16)
        if name == _FINAL_NORM or linear in _READERS:
            return torch.full_like(tensor, 1 - self.family.norm_offset)
        for norm, readers in _READERS.items():
            if linear in readers and tensor.dim() == 2:
                gain = self._gain(f"{layer.rpartition('.')[0]}.{norm}.weight")
                return (tensor.to(torch.float64) * gain @ self._stream).to(torch.float32)
        if linear in _WRITERS:  # a weight's rows and a bias are output channels
            return (self._stream.T @ tensor.to(torch.float64)).to(torch.float32)
        return tensor

    def _gain(self, norm: str) -> torch.Tensor:
        return super().tensor(norm).to(torch.float64) + self.family.norm_offset


def rotated(source: ModelSource, rotation: Rotation, seed: int) -> ModelSource:
    """``source`` itself for ``none``."""
    return source if rotation == "none" else RotatedSource(source, rotation, seed)

