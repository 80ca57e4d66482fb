# SPDX-License-Identifier: Apache-2.0
"""W4Ax linear layer on a CPU: int8 × int8 → int32 matrix products (oneDNN through ``torch._int_mm``, VNNI or AMX where
the CPU has it), equal bit for bit to ``w4ax_gemm_ref``."""

from __future__ import annotations

import torch

from vllm_comet import checkpoint as ck
from vllm_comet.kernels.act_quant import quantize_activation_ref
from vllm_comet.kernels.linear import LinearWeight
from vllm_comet.kernels.w4ax_gemm import scaled_sums


class CpuLinear(torch.nn.Module):
    """Weights unpacked once to int8 ``[N, K]``, cut at the segment boundary. ``weight`` comes from ``sort_blocks``."""

    def __init__(self, weight: LinearWeight, split: int, low_bits: int) -> None:
        super().__init__()
        integers = ck.integer_weight(weight.packed, weight.group_scale, weight.group_size)
        self.register_buffer("low", integers[:, :split].contiguous(), persistent=False)
        self.register_buffer("high", integers[:, split:].contiguous(), persistent=False)
        self.register_buffer("scale", weight.scale, persistent=False)
        self.register_buffer("perm", weight.perm, persistent=False)
        self.low_bits = low_bits

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.ops.vllm_comet.cpu_linear(x, self.low, self.high, self.scale, self.perm, self.low_bits, bias)


@torch.library.custom_op("vllm_comet::cpu_linear", mutates_args=())
def cpu_linear(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    scale: torch.Tensor,
    perm: torch.Tensor | None,
    low_bits: int,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x ``[M, K]``, low int8 ``[N, split]``, high int8 ``[N, K − split]``, scale float32 ``[N]`` → ``[M, N]``."""
    split = low.shape[1]
    codes, scales = quantize_activation_ref(x, perm, split, low_bits)
    sums = [torch.zeros(x.shape[0], low.shape[0], dtype=torch.int32) for _ in range(2)]
    if x.shape[0]:
        for i, (a, w) in enumerate(((codes[:, :split], low), (codes[:, split:], high))):
            if w.shape[1]:
                sums[i] = torch._int_mm(a.contiguous(), w.t())
    y = scaled_sums(*sums, scales, two=high.shape[1] > 0) * scale
    if bias is not None:
        y += bias.to(torch.float32)
    return y.to(x.dtype)


@cpu_linear.register_fake
def _(x, low, high, scale, perm, low_bits, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], low.shape[0])
