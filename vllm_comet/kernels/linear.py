# SPDX-License-Identifier: Apache-2.0
"""A linear layer in the form kernels run it: segments made contiguous at load, one module per kind of device."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_comet import checkpoint as ck


class LinearWeight(NamedTuple):
    """Checkpoint tensors of one layer (one tensor-parallel rank's part), see :mod:`vllm_comet.checkpoint`."""

    packed: torch.Tensor  # int32 [N, K/8]
    scale: torch.Tensor  # float32 [N]
    group_scale: torch.Tensor | None  # uint8 [N, ceil(K/group_size)]
    group_size: int
    act_bits: torch.Tensor  # uint8 [ceil(K/128)]
    perm: torch.Tensor | None  # int32 [K]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8


def make_linear_kernel(weight: LinearWeight, low_bits: int) -> torch.nn.Module:
    """A module ``(x [M, K], bias [N] | None) → [M, N]`` in x's dtype, for the device that holds ``weight``; x stands in
    the model's channel order. ``low_bits`` (4 or 8) is the precision of the INT4 segment."""
    weight, split = sort_blocks(weight)
    if weight.packed.device.type == "cpu":
        from vllm_comet.kernels.cpu_linear import CpuLinear

        return CpuLinear(weight, split, low_bits)
    from vllm_comet.kernels.gpu_linear import GpuLinear

    return GpuLinear(weight, split, low_bits)


def sort_blocks(weight: LinearWeight) -> tuple[LinearWeight, int]:
    """Move INT8 blocks behind INT4 blocks (stable) and return the end of the INT4 segment in channels.

    A checkpoint keeps INT8 blocks last within each tensor-parallel slice, so fewer ranks than slices see them
    interleaved. A short last block stays last: the format makes it INT8 if any block is.
    """
    k, bits = weight.in_features, weight.act_bits.tolist()
    order = sorted(range(len(bits)), key=lambda block: bits[block] == 8)
    split = min(bits.count(4) * ck.BLOCK, k)
    if order == list(range(len(bits))):
        return weight, split
    device = weight.packed.device
    channels = torch.arange(k).split(ck.BLOCK)
    gather = torch.cat([channels[block] for block in order]).to(device)
    words = gather[::8] // 8
    groups = None
    if weight.group_scale is not None:
        groups = weight.group_scale[:, gather[:: weight.group_size] // weight.group_size]
    perm = gather.to(torch.int32) if weight.perm is None else weight.perm[gather]
    return LinearWeight(weight.packed[:, words], weight.scale, groups, weight.group_size, weight.act_bits[order],
                        perm), split
