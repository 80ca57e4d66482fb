# SPDX-License-Identifier: Apache-2.0
"""W4Ax linear layer on a GPU: one activation-quantisation kernel, one GEMM kernel (``kernels/ops.py``)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from vllm_comet.kernels import ops
from vllm_comet.kernels.linear import LinearWeight
from vllm_comet.kernels.tiles import choose_tile

COMPILE_THREADS = 8


class GpuLinear(torch.nn.Module):
    """Weights repacked once into the layout of the device's GEMM kernel. ``weight`` comes from ``sort_blocks``."""

    def __init__(self, weight: LinearWeight, split: int, low_bits: int) -> None:
        super().__init__()
        packed = ops.pack_weight(weight.packed, weight.group_scale, weight.group_size, split)
        self.register_buffer("packed", packed.packed, persistent=False)
        self.register_buffer("group_scale", packed.group_scale, persistent=False)
        self.register_buffer("counters", packed.counters, persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("perm", weight.perm, persistent=False)
        self.n, self.k, self.group_size, self.layout = packed.n, packed.k, packed.group_size, packed.layout
        self.split = split
        self.low_bits = low_bits

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        codes, scales, sums = torch.ops.vllm_comet.quantize_activation(x, self.perm, self.split, self.low_bits)
        return torch.ops.vllm_comet.w4ax_linear(
            codes, scales, sums, self.packed, self.group_scale, self.counters, self.scale, bias, self.n, self.k,
            self.group_size, self.split, self.layout, x.dtype)

    def compile_kernels(self, max_tokens: int, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        """Run every kernel that 1 to ``max_tokens`` tokens can choose, so that serving compiles none."""
        device = self.packed.device
        tiles = {choose_tile(device, self.layout, self.n, self.k, m, self.group_size): m
                 for m in batch_sizes(max_tokens)}

        def run(m: int) -> None:
            with torch.cuda.device(device):  # a thread's own setting
                self(torch.zeros(m, self.k, dtype=dtype, device=device), bias)

        first = {ops.gemm_kernel(self.layout, tile): m for tile, m in tiles.items()}
        for m in first.values():  # the first call of a function sets up what its variants share: not for threads
            run(m)
        with ThreadPoolExecutor(COMPILE_THREADS) as pool:  # most of a compilation runs without Python's lock
            list(pool.map(run, set(tiles.values()) - set(first.values())))


def batch_sizes(max_tokens: int) -> list[int]:
    """Descending sizes among which every tile that up to ``max_tokens`` tokens can choose shows up."""
    return [*range(1, min(max_tokens, 256) + 1), *range(257, max_tokens + 1, 8)][::-1]
