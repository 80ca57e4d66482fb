# SPDX-License-Identifier: Apache-2.0
"""W4Ax GEMM: y = x Wᵀ with two-level 4-bit weights and two-segment 8/4-bit activations, accumulated in int32."""

from __future__ import annotations

import torch


def w4ax_gemm_ref(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    split: int,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``y[m, n] = (s[m, 0] · Σ_{k<split} a·w  +  s[m, 1] · Σ_{k≥split} a·w) · c[n] + bias[n]`` → ``[M, N]``.

    codes int8 ``[M, K]`` and act_scales float32 ``[M, 2]`` from ``quantize_activation_ref``; weight int8 ``[N, K]`` from
    ``checkpoint.integer_weight``; weight_scale float32 ``[N]``. Sums are exact integers; the rest is float32.
    """
    a, w = codes.to(torch.float64), weight.to(torch.float64)  # products and sums below 2**53: exact
    low = (a[:, :split] @ w[:, :split].T).to(torch.float32)
    high = (a[:, split:] @ w[:, split:].T).to(torch.float32)
    y = (low * act_scales[:, :1] + high * act_scales[:, 1:]) * weight_scale
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)
