# SPDX-License-Identifier: Apache-2.0
"""vLLM's own quantised linear kernels, as candidates of ``comet-bench gemm``. Importing it needs vLLM for CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.quantization.utils.marlin_utils import (
    marlin_make_workspace_new,
    marlin_permute_scales,
)
from vllm.scalar_type import scalar_types

if TYPE_CHECKING:
    from vllm_comet.bench.gemm import Candidate

GROUP = 128
CHECKED_ROWS = 64


def _candidate(
    mode: str, copies: int, product: Callable[[int], Any], with_quant: Callable[[int], Any], reference: torch.Tensor
) -> Candidate:
    from vllm_comet.bench.gemm import Candidate, relative_error

    return Candidate(mode, copies, product, with_quant, relative_error(product(0)[:CHECKED_ROWS], reference), 1e-2)


def _scaled(mode: str, x: torch.Tensor, n: int, copies: int, quantize: Callable[..., Any]) -> Candidate:
    """CUTLASS 8-bit product with a scale per token and per channel; ``quantize`` is vLLM's per-token kernel."""

    def weight() -> tuple[torch.Tensor, torch.Tensor]:
        q, scale = quantize(torch.randn(n, x.shape[1], dtype=x.dtype, device=x.device))
        return q.t(), scale.view(1, -1)

    weights = [weight() for _ in range(copies)]
    codes, scale = quantize(x)

    def multiply(a: torch.Tensor, a_scale: torch.Tensor, i: int) -> torch.Tensor:
        return vllm_ops.cutlass_scaled_mm(a, weights[i][0], a_scale, weights[i][1], torch.bfloat16)

    w, w_scale = weights[0]
    reference = (codes[:CHECKED_ROWS].float() * scale[:CHECKED_ROWS]) @ (w.float() * w_scale)
    return _candidate(mode, copies, lambda i: multiply(codes, scale, i), lambda i: multiply(*quantize(x), i), reference)


def cutlass_int8(x: torch.Tensor, n: int, copies: int) -> Candidate:
    return _scaled("cutlass-w8a8-int8", x, n, copies, lambda t: vllm_ops.scaled_int8_quant(t)[:2])


def cutlass_fp8(x: torch.Tensor, n: int, copies: int) -> Candidate:
    return _scaled("cutlass-fp8", x, n, copies,
                   lambda t: vllm_ops.scaled_fp8_quant(t, use_per_token_if_dynamic=True))


def _int4_weight(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes in GPTQ packing int32 ``[K/8, N]``, scales ``[K/128, N]`` and the weight they mean ``[K, N]``."""
    k = x.shape[1]
    packed = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device=x.device)
    scales = torch.rand(k // GROUP, n, device=x.device).to(x.dtype) * 0.01 + 0.01
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)[None, :, None]
    codes = ((packed[:, None] >> shifts) & 15).reshape(k, n)
    return packed, scales, (codes - 8).to(x.dtype) * scales.repeat_interleave(GROUP, dim=0)


def marlin(x: torch.Tensor, n: int, copies: int) -> Candidate:
    (m, k), workspace = x.shape, marlin_make_workspace_new(x.device)
    packed, scales, w = _int4_weight(x, n)
    weights = [vllm_ops.gptq_marlin_repack(packed, k, n, 4) for _ in range(copies)]
    scales = marlin_permute_scales(scales, k, n, GROUP)

    def product(i: int) -> torch.Tensor:
        return vllm_ops.marlin_gemm(x, None, weights[i], None, scales, None, None, None, workspace,
                                    scalar_types.uint4b8, m, n, k, use_fp32_reduce=True)  # fmt: skip

    return _candidate("marlin-w4a16", copies, product, product, x[:CHECKED_ROWS].float() @ w.float())


def machete(x: torch.Tensor, n: int, copies: int) -> Candidate:
    packed, scales, w = _int4_weight(x, n)
    columns = packed.t().contiguous().t()
    kind = scalar_types.uint4b8
    weights = [vllm_ops.machete_prepack_B(columns, x.dtype, kind, x.dtype) for _ in range(copies)]

    def product(i: int) -> torch.Tensor:
        return vllm_ops.machete_mm(x, weights[i], kind, b_group_scales=scales, b_group_size=GROUP)

    return _candidate("machete-w4a16", copies, product, product, x[:CHECKED_ROWS].float() @ w.float())


MODES: dict[str, tuple[float, Callable[[torch.Tensor, int, int], Candidate]]] = {
    "marlin-w4a16": (0.5, marlin),
    "machete-w4a16": (0.5, machete),
    "cutlass-w8a8-int8": (1, cutlass_int8),
    "cutlass-fp8": (1, cutlass_fp8),
}
"""Bytes a weight and the maker ``(x, n, copies)`` of each mode."""
