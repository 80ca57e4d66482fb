# SPDX-License-Identifier: Apache-2.0
"""Linear layers that the GEMM benchmarks run: shapes of known models, random operands, the exact expected output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vllm_comet.checkpoint import BLOCK, num_groups
from vllm_comet.kernels import ops
from vllm_comet.kernels.w4ax_gemm import KernelWeight, scaled_sums

MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "llama3-8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "llama3-70b": {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)},
}
"""[N, K] of the linear layers of a decoder layer, unsharded."""
MODES = {"comet-g128": 128, "comet-g64": 64, "comet-channel": -1}
GRAPH_MAX_M = 256
"""Up to this M, kernels are timed in CUDA graphs over cold weights; above, a launch costs little beside the kernel."""
HIGH_SHARE = 1 / 8
"""Share of channels in the second activation segment: what calibration typically leaves there, so both loops run."""


@dataclass(frozen=True)
class Problem:
    """x bf16 ``[M, K]``, its codes and scales, a weight in kernel layout and its per-channel scale."""

    x: torch.Tensor
    codes: torch.Tensor
    act_scales: torch.Tensor
    sums: torch.Tensor
    weight: KernelWeight
    weight_scale: torch.Tensor

    def expected(self) -> torch.Tensor:
        """bf16 ``[M, N]``, the reference with its integer sums from ``torch._int_mm``."""
        w = ops.unpack_tiles(self.weight)
        m, split = self.x.shape[0], self.weight.split
        codes = torch.nn.functional.pad(self.codes[:, : self.weight.k], (0, 0, 0, max(0, 32 - m)))

        def sums(part: slice) -> torch.Tensor:
            if part.start == part.stop:
                return torch.zeros(m, w.shape[0], dtype=torch.int32, device=codes.device)
            return torch._int_mm(codes[:, part].contiguous(), w[:, part].contiguous().t())[:m]

        k = self.weight.k
        y = scaled_sums(sums(slice(0, split)), sums(slice(split, k)), self.act_scales, split < k) * self.weight_scale
        return y.to(torch.bfloat16)


def random_weight(n: int, k: int, group_size: int, split: int, layout: str | None = None) -> KernelWeight:
    packed = torch.randint(-(2**31), 2**31, (n, k // 8), dtype=torch.int32, device="cuda")
    groups = None
    if group_size != -1:
        groups = torch.randint(1, 17, (n, num_groups(k, group_size)), dtype=torch.uint8, device="cuda")
    return ops.pack_weight(packed, groups, group_size, split, layout)


def make_problem(n: int, k: int, m: int, weight: KernelWeight) -> Problem:
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    quantized = torch.ops.vllm_comet.quantize_activation(x, None, weight.split, 8)
    return Problem(x, *quantized, weight, torch.rand(n, device="cuda") + 0.5)


def low_channels(k: int, high_share: float = HIGH_SHARE) -> int:
    """End of the low segment: whole blocks, at least one block in the other unless ``high_share`` is 0."""
    blocks = -(-k // BLOCK)
    high = 0 if high_share == 0 else max(1, round(blocks * high_share))
    return k if high == 0 else (blocks - high) * BLOCK


def weight_copies(weight: KernelWeight, count: int) -> list[KernelWeight]:
    """``weight`` and ``count − 1`` copies elsewhere in memory."""
    return [weight] + [
        replace(weight, packed=weight.packed.clone(), counters=weight.counters.clone(),
                group_scale=None if weight.group_scale is None else weight.group_scale.clone())
        for _ in range(count - 1)
    ]


