# SPDX-License-Identifier: Apache-2.0
"""Activation quantisation: kernels against the references, on a GPU or in Triton's interpreter."""

import pytest
import torch
from kernel_testing import DEVICE, needs_kernels

from vllm_comet.kernels import act_quant, ops  # noqa: F401 - registers the ops

pytestmark = needs_kernels
# The interpreter's bf16 stores don't round to even, so it gets fp16.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
CASES = [(1, 128, 128), (7, 200, 128), (3, 384, 0), (5, 1000, 896), (2, 640, 640)]
if DEVICE == "cuda":
    CASES += [(118, 4096, 3584), (152, 14336, 12544), (3, 28672, 28672), (300, 4096, 3456), (257, 1000, 1000)]


def inputs(m, k, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * scale
    x[:, :: max(k // 7, 1)] *= 50  # outlier channels
    x[0] = 0
    perm = torch.randperm(k, generator=generator).to(torch.int32)
    return x.to(DTYPE).to(DEVICE), perm.to(DEVICE)


def assert_codes(codes, expected, k, off_by_one=0.0):
    assert codes.dtype == torch.int8 and codes.shape[1] == act_quant.padded_k(k)
    assert not codes[:, k:].any()
    difference = (codes[:, :k].int() - expected.int()).abs()
    assert difference.max() <= (1 if off_by_one else 0)
    assert difference.float().mean() <= off_by_one


def assert_sums(sums, codes, split):
    assert sums.shape == (codes.shape[0], 2) and sums.dtype == torch.int32
    if codes.shape[0] >= act_quant.SUMS_FROM:
        assert torch.equal(sums, act_quant.code_sums_ref(codes, split))


@pytest.mark.parametrize("m,k,split", CASES)
@pytest.mark.parametrize("low_bits", [4, 8])
@pytest.mark.parametrize("gather", [False, True])
def test_plain(m, k, split, low_bits, gather):
    x, perm = inputs(m, k, m + k)
    perm = perm if gather else None
    codes, scales, sums = act_quant.quantize_activation_triton(x, perm, split, low_bits)
    expected, expected_scales = act_quant.quantize_activation_ref(x, perm, split, low_bits)
    assert_codes(codes, expected, k)
    assert_sums(sums, codes, split)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("m,k,split", [case for case in CASES if case[1] <= act_quant.MAX_NORM_K])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(m, k, split, with_residual):
    x, perm = inputs(m, k, m + k)
    residual = inputs(m, k, 99)[0] if with_residual else None
    weight = (torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.5).to(DTYPE).to(DEVICE)
    codes, scales, sums, h = act_quant.rms_norm_quantize_triton(x, residual, weight, 1e-5, perm, split, 8)
    expected, expected_scales, expected_h = act_quant.rms_norm_quantize_ref(x, residual, weight, 1e-5, perm, split, 8)
    assert torch.equal(h, expected_h)
    assert h.data_ptr() != x.data_ptr()
    assert_sums(sums, codes, split)
    assert_codes(codes, expected, k, off_by_one=2e-3)  # the order of the sum of squares differs
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("m,k,split", CASES)
def test_silu_mul(m, k, split):
    gate_up, _ = inputs(m, 2 * k, m + k)
    perm = inputs(m, k, 5)[1]
    codes, scales, sums = act_quant.silu_mul_quantize_triton(gate_up, perm, split, 8)
    expected, expected_scales = act_quant.silu_mul_quantize_ref(gate_up, perm, split, 8)
    assert_codes(codes, expected, k, off_by_one=2e-3)
    assert_sums(sums, codes, split)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=1e-30)


def test_strided_rows():
    x, perm = inputs(4, 512, 3)
    wide = torch.cat([x, x + 1], dim=1)
    for view in (wide[:, 512:], wide[::2, :512], wide[:, ::2]):
        perm_of = perm if view.shape[1] == 512 else None
        codes, scales, _ = act_quant.quantize_activation_triton(view, perm_of, 256, 8)
        expected, expected_scales = act_quant.quantize_activation_ref(view, perm_of, 256, 8)
        assert_codes(codes, expected, view.shape[1])
        assert torch.equal(scales, expected_scales)


def test_no_rows():
    x = torch.empty(0, 200, dtype=DTYPE, device=DEVICE)
    codes, scales, sums = act_quant.quantize_activation_triton(x, None, 128, 8)
    assert codes.shape == (0, 256) and scales.shape == sums.shape == (0, 2)


def test_sums(monkeypatch):
    """Also where the interpreter, for which hundreds of rows take long, runs the kernels."""
    monkeypatch.setattr(act_quant, "SUMS_FROM", 1)
    x, perm = inputs(5, 1000, 7)
    for split, low_bits in ((896, 8), (896, 4), (1000, 8), (0, 8)):
        codes, _, sums = act_quant.quantize_activation_triton(x, perm, split, low_bits)
        assert_sums(sums, codes, split)
        assert sums.any() or not codes.any()


def test_norm_refuses_wide_rows():
    x = torch.zeros(1, 32768, dtype=DTYPE, device=DEVICE)
    with pytest.raises(ValueError, match="16384"):
        act_quant.rms_norm_quantize_triton(x, None, x[0], 1e-5, None, 128, 8)


@pytest.mark.parametrize("k,split,low_bits,word", [
    (256, 100, 8, "split"), (256, 384, 8, "split"), (256, 128, 5, "low_bits"), (200000, 128, 8, "131072"),
])  # fmt: skip
def test_refused(k, split, low_bits, word):
    with pytest.raises(ValueError, match=word):
        act_quant.quantize_activation_triton(torch.zeros(1, k, dtype=DTYPE, device=DEVICE), None, split, low_bits)
