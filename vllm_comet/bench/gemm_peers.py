# SPDX-License-Identifier: Apache-2.0
"""vLLM's own quantised linear kernels, as candidates of ``comet-bench gemm``. Importing it needs vLLM for CUDA."""

from __future__ import annotations

import functools
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


def cutlass_w4a8(x: torch.Tensor, n: int, copies: int) -> Candidate:
    """Activations in e4m3 per token, weights int4 with e4m3 group scales: a weight is rounded to e4m3 in the kernel."""
    packed, _, _ = _int4_weight(x, n)
    k, fp8 = x.shape[1], torch.float8_e4m3fn
    scales = (torch.rand(k // GROUP, n, device=x.device) * 8 + 8).to(fp8)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=x.device)[None, :, None]
    codes = ((packed[:, None] >> shifts) & 15).reshape(k, n) - 8
    w = (codes.float() * scales.float().repeat_interleave(GROUP, dim=0)).to(fp8).float()
    signed = (packed ^ -2004318072).t().contiguous().t()  # 0x88888888: q − 8 in two's complement
    weights = [vllm_ops.cutlass_encode_and_reorder_int4b(signed) for _ in range(copies)]
    group_scales, channel_scales = vllm_ops.cutlass_pack_scale_fp8(scales), torch.ones(n, 1, device=x.device)
    quantize = functools.partial(vllm_ops.scaled_fp8_quant, use_per_token_if_dynamic=True)
    a, a_scale = quantize(x)

    def multiply(a: torch.Tensor, a_scale: torch.Tensor, i: int) -> torch.Tensor:
        return vllm_ops.cutlass_w4a8_mm(a, weights[i], group_scales, GROUP, channel_scales, a_scale)

    reference = (a[:CHECKED_ROWS].float() * a_scale[:CHECKED_ROWS]) @ w
    return _candidate("cutlass-w4a8-fp8", copies, lambda i: multiply(a, a_scale, i),
                      lambda i: multiply(*quantize(x), i), reference)


def humming(x: torch.Tensor, n: int, copies: int) -> Candidate:
    """Humming's W4A8-INT8 with group scales, prepared and called as vLLM's HummingLinearKernel does."""
    from vllm.utils.import_utils import has_humming

    if not has_humming():
        raise RuntimeError("vLLM's optional package humming-kernels is not installed")
    from vllm.model_executor.layers.quantization.utils import humming as layers
    from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym
    from vllm.utils import humming as lib

    k = x.shape[1]
    packed, scales, w = _int4_weight(x, n)  # Humming packs along K for each row: the transpose of GPTQ's words
    given = {"weight": packed.t().contiguous(), "weight_scale": scales.t().contiguous()}
    schema = lib.BaseWeightSchema.from_config(
        {"quant_method": "humming", "dtype": "int4", "group_size": GROUP, "has_zero_point": False})
    shape = {"shape_n_stacks": [n], "shape_k_stacks": [k], "param_dtype": x.dtype}
    schema, given = schema.convert_humming(tensors=given, **shape)
    inputs, _ = layers.quant_key_to_input_schema(kInt8DynamicTokenSym).convert_humming(tensors=given, **shape)
    config, tensors = lib.prepare_and_transform_humming_tensors(
        tensors=given, shape_n=n, shape_k=k, weight_schema=schema, input_schema=inputs, pad_n_to_multiple=256,
        pad_k_to_multiple=128, has_bias=False, torch_dtype=x.dtype, device=x.device)
    weights = [tensors["weight"].clone() for _ in range(copies)]
    locks, compute_config = lib.create_humming_locks(x.device), layers.get_humming_linear_compute_config()
    codes, scale = lib.may_quant_input(config, x)

    def multiply(a: torch.Tensor, a_scale: torch.Tensor | None, i: int) -> torch.Tensor:
        return lib.humming_forward(config, inputs=a, weight=weights[i], weight_scale=tensors["weight_scale"],
                                   input_scale=a_scale, locks=locks, compute_config=compute_config)

    reference = (codes[:CHECKED_ROWS].float() * scale[:CHECKED_ROWS].view(-1, 1)) @ w.float()
    return _candidate("humming-w4a8-int8", copies, lambda i: multiply(codes, scale, i), lambda i: multiply(x, None, i),
                      reference)


def norms(m: int, k: int, split: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """vLLM's residual add + RMSNorm, and ours with quantisation in the same kernel, on ``[m, k]``."""
    x, residual = (torch.randn(m, k, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.ones(k, dtype=torch.bfloat16, device="cuda")
    perm = torch.randperm(k, device="cuda").to(torch.int32)
    return (lambda: vllm_ops.fused_add_rms_norm(x, residual, weight, 1e-5),
            lambda: torch.ops.vllm_comet.rms_norm_quantize(x, residual, weight, 1e-5, perm, split, 8))


def silus(m: int, k: int, split: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """vLLM's SiLU·mul, and ours with quantisation in the same kernel, on ``[m, 2k]``."""
    x = torch.randn(m, 2 * k, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    return (lambda: torch.ops._C.silu_and_mul(out, x),
            lambda: torch.ops.vllm_comet.silu_mul_quantize(x, None, split, 8))


MODES: dict[str, tuple[float, Callable[[torch.Tensor, int, int], Candidate]]] = {
    "marlin-w4a16": (0.5, marlin),
    "machete-w4a16": (0.5, machete),
    "cutlass-w8a8-int8": (1, cutlass_int8),
    "cutlass-fp8": (1, cutlass_fp8),
    "cutlass-w4a8-fp8": (0.5, cutlass_w4a8),
    "humming-w4a8-int8": (0.5, humming),
}
"""Bytes a weight and the maker ``(x, n, copies)`` of each mode."""
