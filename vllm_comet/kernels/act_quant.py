# SPDX-License-Identifier: Apache-2.0
"""Dynamic per-token activation quantisation in two segments, alone or fused with RMSNorm or SiLU·mul.

A row of x, gathered into stored order, is cut at ``split``: positions below it are the INT4 segment, the others the
INT8 segment. Each segment of each row has its own symmetric scale. With ``low_bits`` 8 the low segment runs in INT8.

The ``*_ref`` functions define the results; the Triton kernels do a row per program, gather included, in one pass.
"""

from __future__ import annotations

import torch

from vllm_comet.kernels._triton import require_triton, tl, triton

QMAX = {4: 7, 8: 127}
"""Largest code of a symmetric segment of 4 or 8 bits (−8 and −128 are not used)."""
TINY = 1e-20
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

    Per row and segment, in float32: ``a = max|x|``, ``code = rint(x · (1 / max(a, 1e-20) · qmax))`` (ties to even),
    ``scale = a · float32(1 / qmax)``. An empty segment has scale 0.
    """
    x = x.to(torch.float32)
    if perm is not None:
        x = x.index_select(1, perm.to(torch.int64))
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.zeros(x.shape[0], 2, dtype=torch.float32, device=x.device)
    for segment, (start, end, bits) in enumerate(((0, split, low_bits), (split, x.shape[1], 8))):
        if start == end:
            continue
        part, qmax = x[:, start:end], QMAX[bits]
        amax = part.abs().amax(dim=1, keepdim=True)
        codes[:, start:end] = torch.round(part * (amax.clamp_min(TINY).reciprocal() * qmax)).to(torch.int8)
        scales[:, segment] = amax[:, 0] * (1.0 / qmax)
    return codes, scales


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
def _quantize_segment(v, inside, QMAX_: tl.constexpr):
    """Row part ``v`` where ``inside`` → rounded codes in float32 and the scale."""
    amax = tl.max(tl.where(inside, tl.abs(v), 0.0), axis=0)
    inverse = tl.div_rn(1.0, tl.maximum(amax, 1e-20)) * QMAX_
    magic: tl.constexpr = 12582912.0  # 1.5 · 2**23: adding it leaves no fraction bits, so the sum is rounded to even
    return (v * inverse + magic) - magic, amax * (1.0 / QMAX_)


@triton.jit
def _store_codes(v, col, row, codes_ptr, scales_ptr, K, k_pad, split, LOW_QMAX: tl.constexpr, TWO: tl.constexpr):
    """Quantise the float32 row ``v`` (zero from K on) and write its codes and both scales."""
    in_low = col < split
    code, low_scale = _quantize_segment(v, in_low, LOW_QMAX)
    high_scale = 0.0
    if TWO:
        high, high_scale = _quantize_segment(v, col >= split, 127)
        code = tl.where(in_low, code, high)
    tl.store(codes_ptr + row * k_pad + col, code.to(tl.int8), mask=col < k_pad)
    tl.store(scales_ptr + row * 2, low_scale)
    tl.store(scales_ptr + row * 2 + 1, high_scale)


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
    x_ptr, perm_ptr, codes_ptr, scales_ptr, K, k_pad, split, stride_x,
    BLOCK: tl.constexpr, HAS_PERM: tl.constexpr, LOW_QMAX: tl.constexpr, TWO: tl.constexpr, PDL: tl.constexpr,
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
    _store_codes(v, col, row, codes_ptr, scales_ptr, K, k_pad, split, LOW_QMAX, TWO)


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, h_ptr, weight_ptr, perm_ptr, codes_ptr, scales_ptr, K, k_pad, split, stride_x, stride_r, eps,
    BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_PERM: tl.constexpr, LOW_QMAX: tl.constexpr, TWO: tl.constexpr,
    PDL: tl.constexpr,
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
    _store_codes(v, col, row, codes_ptr, scales_ptr, K, k_pad, split, LOW_QMAX, TWO)


@triton.jit
def _silu_mul_kernel(
    x_ptr, perm_ptr, codes_ptr, scales_ptr, K, k_pad, split, stride_x,
    BLOCK: tl.constexpr, HAS_PERM: tl.constexpr, LOW_QMAX: tl.constexpr, TWO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    channel = _channels(perm_ptr, col, K, HAS_PERM)
    _wait_for_inputs(PDL)
    gate = tl.load(x_ptr + row * stride_x + channel, mask=col < K, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + K + channel, mask=col < K, other=0.0).to(tl.float32)
    v = gate * tl.sigmoid(gate) * up
    _store_codes(v, col, row, codes_ptr, scales_ptr, K, k_pad, split, LOW_QMAX, TWO)


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


def new_outputs(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised codes int8 ``[M, Kpad]`` and scales float32 ``[M, 2]``."""
    codes = torch.empty(x.shape[0], padded_k(k), dtype=torch.int8, device=x.device)
    return codes, torch.empty(x.shape[0], 2, dtype=torch.float32, device=x.device)


def pdl_supported(device: torch.device) -> bool:
    """Programmatic dependent launch (Hopper and later): a kernel's prologue overlaps the end of the one before it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _meta(k: int, split: int, low_bits: int, perm: torch.Tensor | None, device: torch.device) -> dict[str, object]:
    require_triton("activation quantisation")
    check_segments(k, split, low_bits)
    block = max(triton.next_power_of_2(padded_k(k)), 128)
    pdl = pdl_supported(device)
    meta = dict(BLOCK=block, HAS_PERM=perm is not None, LOW_QMAX=QMAX[low_bits], TWO=split < k, PDL=pdl,
                num_warps=min(32, max(4, block // 1024)), enable_fp_fusion=False)
    return {**meta, "launch_pdl": True} if pdl else meta


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def quantize_activation_triton(
    x: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_activation_ref`` as one kernel; the codes are ``[M, Kpad]`` with zeros behind K."""
    x, k = _rows(x), x.shape[1]
    meta = _meta(k, split, low_bits, perm, x.device)
    codes, scales = new_outputs(x, k)
    if x.shape[0]:
        _quantize_kernel[(x.shape[0],)](x, perm, codes, scales, k, codes.shape[1], split, x.stride(0), **meta)
    return codes, scales


def rms_norm_quantize_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, perm: torch.Tensor | None,
    split: int, low_bits: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``rms_norm_quantize_ref`` as one kernel; codes ``[M, Kpad]``. Without a residual, h is a copy of x."""
    x, k = _rows(x), x.shape[1]
    if k > MAX_NORM_K:
        raise ValueError(f"K = {k} channels; rms_norm_quantize handles up to {MAX_NORM_K}. Norm and quantise apart.")
    residual = None if residual is None else _rows(residual)
    meta = _meta(k, split, low_bits, perm, x.device)
    codes, scales = new_outputs(x, k)
    h = x.clone() if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        _rms_norm_kernel[(x.shape[0],)](
            x, residual, h, weight, perm, codes, scales, k, codes.shape[1], split, x.stride(0),
            0 if residual is None else residual.stride(0), eps, HAS_RESIDUAL=residual is not None, **meta)  # fmt: skip
    return codes, scales, h


def silu_mul_quantize_triton(
    gate_up: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``silu_mul_quantize_ref`` as one kernel; codes ``[M, Kpad]``."""
    gate_up, k = _rows(gate_up), gate_up.shape[1] // 2
    meta = _meta(k, split, low_bits, perm, gate_up.device)
    codes, scales = new_outputs(gate_up, k)
    if gate_up.shape[0]:
        _silu_mul_kernel[(gate_up.shape[0],)](
            gate_up, perm, codes, scales, k, codes.shape[1], split, gate_up.stride(0), **meta)
    return codes, scales
