# SPDX-License-Identifier: Apache-2.0
"""The plugin's custom ops, ``torch.ops.vllm_comet.*``: what torch.compile and CUDA graphs see of the kernels.

Each op has a CUDA implementation (Triton), a CPU implementation (the torch reference) and a fake one (shapes only).
Nothing in them waits for the GPU: kernels and tiles are chosen from shapes alone. Importing this module registers the
ops once and initialises no GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_comet.kernels import act_quant
from vllm_comet.kernels.tiles import Tile, choose_tile
from vllm_comet.kernels.w4ax_gemm import (
    BLOCK,
    KernelWeight,
    pack_weight,
    unpack_tiles,
    w4ax_gemm_ref,
    w4ax_gemm_triton,
)

__all__ = ["KernelWeight", "pack_weight", "w4ax_linear"]

_SCHEMAS = {
    "quantize_activation": "(Tensor x, Tensor? perm, int split, int low_bits) -> (Tensor, Tensor, Tensor)",
    "rms_norm_quantize": "(Tensor x, Tensor? residual, Tensor weight, float eps, Tensor? perm, int split, int low_bits)"
                         " -> (Tensor, Tensor, Tensor, Tensor)",
    "silu_mul_quantize": "(Tensor gate_up, Tensor? perm, int split, int low_bits) -> (Tensor, Tensor, Tensor)",
    # `counters` is zero before and after every call, so it doesn't count as mutated.
    "w4ax_linear": "(Tensor codes, Tensor act_scales, Tensor sums, Tensor packed, Tensor? group_scale, "
                   "Tensor counters, Tensor weight_scale, Tensor? bias, int n, int k, int group_size, int split, "
                   "str layout, ScalarType out_dtype) -> Tensor",
}  # fmt: skip


def w4ax_linear(
    codes: torch.Tensor,
    act_scales: torch.Tensor,
    sums: torch.Tensor,
    weight: KernelWeight,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """``torch.ops.vllm_comet.w4ax_linear`` with the weight's parts filled in.

    codes int8 ``[M, Kpad]``, act_scales float32 ``[M, 2]`` and sums int32 ``[M, 2]`` from ``quantize_activation`` with
    the weight's ``split``; weight_scale float32 ``[N]``; bias ``[N]`` or None → ``[M, N]`` in ``out_dtype`` (bf16, fp16
    or fp32).
    """
    return torch.ops.vllm_comet.w4ax_linear(
        codes, act_scales, sums, weight.packed, weight.group_scale, weight.counters, weight_scale, bias, weight.n,
        weight.k, weight.group_size, weight.split, weight.layout, out_dtype)  # fmt: skip


def gemm_kernel(layout: str, tile: Tile) -> Callable[..., torch.Tensor]:
    """The launcher that reads weights of ``layout`` and takes ``tile``."""
    if layout == "triton":
        return w4ax_gemm_triton
    if tile.form == "small":  # imported here, because Gluon's modules need a Triton that has it
        from vllm_comet.kernels.w4ax_gemm_hopper_small import w4ax_gemm_hopper_small

        return w4ax_gemm_hopper_small
    from vllm_comet.kernels.w4ax_gemm_hopper import w4ax_gemm_hopper

    return w4ax_gemm_hopper


# ------------------------------------------------------------------------------------------------------ implementations
def _w4ax_linear_cuda(codes, act_scales, sums, packed, group_scale, counters, weight_scale, bias, n, k, group_size,
                      split, layout, out_dtype):  # fmt: skip
    weight = KernelWeight(packed, group_scale, counters, n, k, group_size, split, layout)
    tile = choose_tile(codes.device, layout, n, k, codes.shape[0], group_size)
    return gemm_kernel(layout, tile)(
        codes, act_scales, weight, weight_scale, bias, out_dtype, tile, act_quant.written_sums(sums))


def _w4ax_linear_cpu(codes, act_scales, sums, packed, group_scale, counters, weight_scale, bias, n, k, group_size,
                     split, layout, out_dtype):  # fmt: skip
    weight = unpack_tiles(KernelWeight(packed, group_scale, counters, n, k, group_size, split, layout))
    return w4ax_gemm_ref(codes[:, :k], act_scales, weight, weight_scale, split, bias, out_dtype)


def _w4ax_linear_fake(codes, act_scales, sums, packed, group_scale, counters, weight_scale, bias, n, k, group_size,
                      split, layout, out_dtype):  # fmt: skip
    return codes.new_empty(codes.shape[0], n, dtype=out_dtype)


def _pad_codes(codes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))


def _quantize_cpu(x, perm, split, low_bits):
    act_quant.check_segments(x.shape[1], split, low_bits)
    codes, scales = act_quant.quantize_activation_ref(x, perm, split, low_bits)
    return _pad_codes(codes), scales, act_quant.code_sums_ref(codes, split)


def _quantize_fake(x, perm, split, low_bits):
    return act_quant.new_outputs(x, x.shape[1])


def _rms_norm_cpu(x, residual, weight, eps, perm, split, low_bits):
    act_quant.check_segments(x.shape[1], split, low_bits)
    codes, scales, h = act_quant.rms_norm_quantize_ref(x, residual, weight, eps, perm, split, low_bits)
    return _pad_codes(codes), scales, act_quant.code_sums_ref(codes, split), h.clone() if h is x else h


def _rms_norm_fake(x, residual, weight, eps, perm, split, low_bits):
    return (*act_quant.new_outputs(x, x.shape[1]), torch.empty_like(x))


def _silu_mul_cpu(gate_up, perm, split, low_bits):
    act_quant.check_segments(gate_up.shape[1] // 2, split, low_bits)
    codes, scales = act_quant.silu_mul_quantize_ref(gate_up, perm, split, low_bits)
    return _pad_codes(codes), scales, act_quant.code_sums_ref(codes, split)


def _silu_mul_fake(gate_up, perm, split, low_bits):
    return act_quant.new_outputs(gate_up, gate_up.shape[1] // 2)


_IMPLEMENTATIONS: dict[str, tuple[Callable, Callable, Callable]] = {
    "quantize_activation": (act_quant.quantize_activation_triton, _quantize_cpu, _quantize_fake),
    "rms_norm_quantize": (act_quant.rms_norm_quantize_triton, _rms_norm_cpu, _rms_norm_fake),
    "silu_mul_quantize": (act_quant.silu_mul_quantize_triton, _silu_mul_cpu, _silu_mul_fake),
    "w4ax_linear": (_w4ax_linear_cuda, _w4ax_linear_cpu, _w4ax_linear_fake),
}


def _register() -> torch.library.Library:
    library = torch.library.Library("vllm_comet", "FRAGMENT")
    for name, (cuda, cpu, fake) in _IMPLEMENTATIONS.items():
        library.define(name + _SCHEMAS[name])
        library.impl(name, cuda, "CUDA")
        library.impl(name, cpu, "CPU")
        torch.library.register_fake(f"vllm_comet::{name}", fake, lib=library)
    return library


if not hasattr(torch.ops.vllm_comet, "w4ax_linear"):  # a second import under another name must not define them again
    _LIBRARY = _register()
