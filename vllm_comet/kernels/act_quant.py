# SPDX-License-Identifier: Apache-2.0
"""Dynamic per-token activation quantisation in two segments, alone or fused with RMSNorm or SiLU·mul.

A row of x, gathered into stored order, is cut at ``split``: positions below it are the INT4 segment, the others the
INT8 segment. Each segment of each row has its own symmetric scale. With ``low_bits`` 8 the low segment runs in INT8.

The two scales of a row differ by a power of two, so that a GEMM needs one integer accumulator for both segments: it
shifts the sum of the first into units of the second.

The ``*_ref`` functions define the results; the Triton kernels do a row per program, gather included, in one pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_comet.kernels._triton import Launcher, require_triton, tl, triton

QMAX = {4: 7, 8: 127}
"""Largest code of a symmetric segment of 4 or 8 bits (−8 and −128 are not used)."""
CLIP = 0.75
"""Part of a 4-bit segment's largest magnitude that its largest code stands for; what is larger saturates, as in QuaRot
(arXiv 2404.00456), which takes 0.9. Of 0.6 to 1 in steps of 0.1, SmolLM2 has its best perplexity at 0.7 and 0.8. Eight
bits are not clipped."""
TINY = 1e-20
"""A segment whose largest magnitude is below this counts as zero."""
MIN_SHIFT, MAX_SHIFT = -4, 15
"""Bounds of log2(high scale / low scale). Shifted by 4 bits, a sum of 4-bit codes over MAX_K channels fits 31 bits."""
SUMS_FROM = 65
"""Rows from which the kernels also give the sums of each row's codes, for GEMMs that take weights as unsigned."""
K_ALIGN = 128
"""Kernels pad the rows of codes with zeros to a multiple of this, the K block of the GEMM."""
MAX_K = 131072
MAX_NORM_K = 16384


# ----------------------------------------------------------------------------------------------------------- references
def quantize_activation_ref(
    x: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` ``[M, K]`` (fp32, bf16 or fp16) to int8 codes ``[M, K]`` and float32 scales ``[M, 2]``.

    perm: int32/int64 ``[K]`` or None; position j of the result holds channel ``perm[j]``.
    split: end of the low segment, 0..K. low_bits: 4 or 8, the precision of the low segment; the other has 8.

    Per row and segment, in float32: ``code = rint(x / scale)`` (ties to even), at most qmax in magnitude, where
    ``scale`` starts as ``max|x| · float32(step_of(bits))``, or 0 below ``TINY``; ``align_scales`` then makes the ratio
    of a row's two scales a power of two. An empty segment has the other's scale.
    """
    x = x.to(torch.float32)
    if perm is not None:
        x = x.index_select(1, perm.to(torch.int64))
    parts = x.split((split, x.shape[1] - split), dim=1)
    bits = (low_bits, 8)
    scales = align_scales(*(_scale_ref(part, step_of(b)) for part, b in zip(parts, bits, strict=True)), low_bits)
    inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)
    codes = [torch.round(part * inverse[:, i : i + 1]).clamp(-QMAX[bits[i]], QMAX[bits[i]])
             for i, part in enumerate(parts)]
    return torch.cat(codes, dim=1).to(torch.int8), scales


def step_of(bits: int) -> float:
    """Scale of a segment of ``bits`` bits whose largest magnitude is 1, before ``align_scales``."""
    return (CLIP if bits == 4 else 1.0) / QMAX[bits]


def _scale_ref(part: torch.Tensor, step: float) -> torch.Tensor:
    if not part.shape[1]:
        return part.new_zeros(part.shape[0])
    amax = part.abs().amax(dim=1)
    return torch.where(amax < TINY, 0.0, amax * step)


def align_scales(low: torch.Tensor, high: torch.Tensor, low_bits: int) -> torch.Tensor:
    """Raise one of a row's two float32 scales ``[M]`` until ``high = low · 2**shift`` → ``[M, 2]``.

    With 8 bits in both segments the low one grows, by less than twice, since outliers make the larger error; with 4
    bits in the low one, whose steps are coarse already, the high one. MIN_SHIFT ≤ shift ≤ MAX_SHIFT, and at least 0 for
    8 bits. A scale of 0 becomes the other's.
    """
    low, high = torch.where(low > 0, low, high), torch.where(high > 0, high, low)
    a, b = low.view(torch.int32), high.view(torch.int32)  # bits of positive floats: exponent · 2**23 + fraction
    if low_bits == 8:
        b = torch.maximum(a, b)
        return torch.stack((b - ((b - a >> 23).clamp_max(MAX_SHIFT) << 23), b), dim=1).view(torch.float32)
    shift = -(a - b >> 23)
    a = torch.where(shift > MAX_SHIFT, b - (MAX_SHIFT << 23), a)
    return torch.stack((a, a + (shift.clamp(MIN_SHIFT, MAX_SHIFT) << 23)), dim=1).view(torch.float32)


def code_sums_ref(codes: torch.Tensor, split: int) -> torch.Tensor:
    """int32 ``[M, 2]``: sums of the codes ``[M, K]`` of both segments."""
    parts = codes.split((split, codes.shape[1] - split), dim=1)
    return torch.stack([part.sum(dim=1, dtype=torch.int32) for part in parts], dim=1)


def rms_norm_quantize_ref(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, perm: torch.Tensor | None,
    split: int, low_bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``h = x + residual`` (rounded to x's dtype), quantised ``h / rms(h) · weight`` → codes, scales, h ``[M, K]``.

    weight ``[K]`` in the model's channel order, as are x and residual; the normed row stays float32 until quantised.
    """
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    f = h.float()
    normed = f * torch.rsqrt(f.square().mean(dim=1, keepdim=True) + eps) * weight.float()
    return (*quantize_activation_ref(normed, perm, split, low_bits), h)


def silu_mul_quantize_ref(
    gate_up: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``silu(gate) · up`` of ``gate_up`` ``[M, 2K]`` (gate first), computed in float32."""
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize_activation_ref(gate * torch.sigmoid(gate) * up, perm, split, low_bits)


# -------------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def _wait_for_inputs(PDL: tl.constexpr):
    """Under programmatic dependent launch: let the next kernel start its own prologue, then wait for our inputs."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _segment_scale(v, inside, STEP: tl.constexpr):
    amax = tl.max(tl.where(inside, tl.abs(v), 0.0), axis=0)
    return tl.where(amax < 1e-20, 0.0, amax * STEP)


@triton.jit
def _align_scales(low, high, LOW_QMAX: tl.constexpr):
    """``align_scales`` of one row."""
    a = tl.where(low > 0, low, high).to(tl.int32, bitcast=True)
    b = tl.where(high > 0, high, low).to(tl.int32, bitcast=True)
    if LOW_QMAX == 127:
        b = tl.maximum(a, b)
        a = b - (tl.minimum((b - a) >> 23, 15) << 23)
    else:
        shift = -((a - b) >> 23)
        a = tl.where(shift > 15, b - (15 << 23), a)
        b = a + (tl.minimum(tl.maximum(shift, -4), 15) << 23)
    return a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)


@triton.jit
def _store_codes(v, col, row, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split,
                 LOW_QMAX: tl.constexpr, LOW_STEP: tl.constexpr, TWO: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """Quantise the float32 row ``v`` (zero from K on) and write its codes, both scales and, if wanted, both sums."""
    in_low = col < split
    low = _segment_scale(v, in_low, LOW_STEP)
    high = low
    if TWO:
        low, high = _align_scales(low, _segment_scale(v, col >= split, 1.0 / 127), LOW_QMAX)
    scale = tl.where(in_low, low, high) if TWO else low
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.maximum(scale, 1e-30)), 0.0)
    magic: tl.constexpr = 12582912.0  # 1.5 · 2**23: adding it leaves no fraction bits, so the sum is rounded to even
    codes = ((v * inverse + magic) - magic).to(tl.int32)
    if LOW_QMAX < 127:  # clipped
        clipped = tl.minimum(tl.maximum(codes, -LOW_QMAX), LOW_QMAX)
        codes = tl.where(in_low, clipped, codes) if TWO else clipped
    tl.store(codes_ptr + row * k_pad + col, codes.to(tl.int8), mask=col < k_pad)
    tl.store(scales_ptr + row * 2, low)
    tl.store(scales_ptr + row * 2 + 1, high)
    if SUMS:
        total = tl.sum(codes, axis=0)
        in_first = tl.sum(tl.where(in_low, codes, 0), axis=0) if TWO else total
        tl.store(sums_ptr + row * 2, in_first)
        tl.store(sums_ptr + row * 2 + 1, total - in_first)


@triton.jit
def _channels(perm_ptr, col, K, HAS_PERM: tl.constexpr):
    if HAS_PERM:
        return tl.load(perm_ptr + col, mask=col < K, other=0)
    return col


@triton.jit
def _permute(v, channel, inside, HAS_PERM: tl.constexpr):
    """The row in stored order, by way of shared memory: global memory is slow to read or write two bytes at a time."""
    if HAS_PERM:
        return tl.where(inside, tl.gather(v, channel, 0), 0.0)
    return v


@triton.jit
def _quantize_kernel(
    x_ptr, perm_ptr, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split, stride_x,
    BLOCK: tl.constexpr, HAS_PERM: tl.constexpr, LOW_QMAX: tl.constexpr, LOW_STEP: tl.constexpr,
    TWO: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    channel = _channels(perm_ptr, col, K, HAS_PERM)
    _wait_for_inputs(PDL)
    if BLOCK > 16384:  # too long for shared memory
        v = tl.load(x_ptr + row * stride_x + channel, mask=col < K, other=0.0).to(tl.float32)
    else:
        v = tl.load(x_ptr + row * stride_x + col, mask=col < K, other=0.0).to(tl.float32)
        v = _permute(v, channel, col < K, HAS_PERM)
    _store_codes(v, col, row, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split, LOW_QMAX, LOW_STEP, TWO, SUMS)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, h_ptr, weight_ptr, perm_ptr, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split,
    stride_x, stride_r, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PERM: tl.constexpr,
    LOW_QMAX: tl.constexpr, LOW_STEP: tl.constexpr, TWO: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < K
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0).to(tl.float32)
    channel = _channels(perm_ptr, col, K, HAS_PERM)
    _wait_for_inputs(PDL)
    h = tl.load(x_ptr + row * stride_x + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        h += tl.load(residual_ptr + row * stride_r + col, mask=inside, other=0.0).to(tl.float32)
        rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + row * K + col, rounded, mask=inside)
        h = rounded.to(tl.float32)
    v = h * tl.rsqrt(tl.sum(h * h, axis=0) / K + eps) * weight
    v = _permute(v, channel, inside, HAS_PERM)
    _store_codes(v, col, row, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split, LOW_QMAX, LOW_STEP, TWO, SUMS)


@triton.jit
def _silu_mul_kernel(
    x_ptr, perm_ptr, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split, stride_x,
    BLOCK: tl.constexpr, HAS_PERM: tl.constexpr, LOW_QMAX: tl.constexpr, LOW_STEP: tl.constexpr,
    TWO: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    channel = _channels(perm_ptr, col, K, HAS_PERM)
    _wait_for_inputs(PDL)
    gate = tl.load(x_ptr + row * stride_x + channel, mask=col < K, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + K + channel, mask=col < K, other=0.0).to(tl.float32)
    v = gate * tl.sigmoid(gate) * up
    _store_codes(v, col, row, codes_ptr, scales_ptr, sums_ptr, K, k_pad, split, LOW_QMAX, LOW_STEP, TWO, SUMS)


# ------------------------------------------------------------------------------------------------------------ launchers
def padded_k(k: int) -> int:
    return -(-k // K_ALIGN) * K_ALIGN


def check_segments(k: int, split: int, low_bits: int) -> None:
    """Raise ValueError unless ``split`` is a block boundary (or K) and ``low_bits`` is 4 or 8."""
    if low_bits not in QMAX:
        raise ValueError(f"low_bits is {low_bits}; allowed: {sorted(QMAX)}.")
    if not 0 <= split <= k or (split % K_ALIGN and split != k):
        raise ValueError(f"split is {split}; allowed: multiples of {K_ALIGN} up to K = {k}, or K.")
    if k > MAX_K:
        raise ValueError(f"K = {k} channels; activation quantisation handles up to {MAX_K}.")


def new_outputs(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised codes int8 ``[M, Kpad]``, scales float32 ``[M, 2]`` and sums int32 ``[M, 2]``."""
    m, device = x.shape[0], x.device
    return (torch.empty(m, padded_k(k), dtype=torch.int8, device=device),
            torch.empty(m, 2, dtype=torch.float32, device=device), torch.empty(m, 2, dtype=torch.int32, device=device))


def written_sums(sums: torch.Tensor) -> torch.Tensor | None:
    """``sums`` ``[M, 2]`` of a kernel, or None if M is too small for it to have written them."""
    return sums if sums.shape[0] >= SUMS_FROM else None


@functools.cache
def pdl_supported(device: torch.device) -> bool:
    """Programmatic dependent launch (Hopper and later): a kernel's prologue overlaps the end of the one before it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _launcher(
    kernel: Any, k: int, split: int, low_bits: int, has_perm: bool, sums: bool, device: torch.device, **parameters: bool
) -> Launcher:
    require_triton("activation quantisation")
    check_segments(k, split, low_bits)
    block = max(triton.next_power_of_2(padded_k(k)), 128)
    pdl = pdl_supported(device)
    return Launcher(kernel, BLOCK=block, HAS_PERM=has_perm, LOW_QMAX=QMAX[low_bits], LOW_STEP=step_of(low_bits),
                    TWO=split < k, SUMS=sums, PDL=pdl, num_warps=min(32, max(4, block // 1024)),
                    enable_fp_fusion=False, **parameters, **({"launch_pdl": True} if pdl else {}))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def quantize_activation_triton(
    x: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``quantize_activation_ref`` as one kernel → codes, scales, sums.

    The codes are ``[M, Kpad]`` with zeros behind K, the sums ``code_sums_ref`` if M ≥ ``SUMS_FROM``, else undefined.
    """
    x, k = _rows(x), x.shape[1]
    launch = _launcher(_quantize_kernel, k, split, low_bits, perm is not None, x.shape[0] >= SUMS_FROM, x.device)
    codes, scales, sums = new_outputs(x, k)
    if x.shape[0]:
        launch((x.shape[0], 1, 1), x, perm, codes, scales, sums, k, codes.shape[1], split, x.stride(0))
    return codes, scales, sums


def rms_norm_quantize_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, perm: torch.Tensor | None,
    split: int, low_bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rms_norm_quantize_ref`` as one kernel → codes, scales, sums as in ``quantize_activation_triton``, and h
    ``[M, K]``, without a residual a copy of x."""
    x, k = _rows(x), x.shape[1]
    if k > MAX_NORM_K:
        raise ValueError(f"K = {k} channels; rms_norm_quantize handles up to {MAX_NORM_K}. Norm and quantise apart.")
    residual = None if residual is None else _rows(residual)
    launch = _launcher(_rms_norm_kernel, k, split, low_bits, perm is not None, x.shape[0] >= SUMS_FROM, x.device,
                       HAS_RESIDUAL=residual is not None)
    codes, scales, sums = new_outputs(x, k)
    h = x.clone() if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        launch((x.shape[0], 1, 1), x, residual, h, weight, perm, codes, scales, sums, k, codes.shape[1], split,
               x.stride(0), 0 if residual is None else residual.stride(0), eps)
    return codes, scales, sums, h


def silu_mul_quantize_triton(
    gate_up: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``silu_mul_quantize_ref`` as one kernel → codes, scales, sums as in ``quantize_activation_triton``."""
    gate_up, k = _rows(gate_up), gate_up.shape[1] // 2
    m = gate_up.shape[0]
    launch = _launcher(_silu_mul_kernel, k, split, low_bits, perm is not None, m >= SUMS_FROM, gate_up.device)
    codes, scales, sums = new_outputs(gate_up, k)
    if m:
        launch((m, 1, 1), gate_up, perm, codes, scales, sums, k, codes.shape[1], split, gate_up.stride(0))
    return codes, scales, sums
