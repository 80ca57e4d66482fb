# SPDX-License-Identifier: Apache-2.0
"""The linear layer as served: block order, CPU execution, and agreement with a float64 product."""

import pytest
import tiny
import torch

from vllm_comet import checkpoint as ck
from vllm_comet.kernels.act_quant import MAX_SHIFT, MIN_SHIFT, QMAX, align_scales, quantize_activation_ref
from vllm_comet.kernels.gpu_linear import batch_sizes
from vllm_comet.kernels.linear import LinearWeight, make_linear_kernel, sort_blocks
from vllm_comet.kernels.tiles import choose_tile
from vllm_comet.kernels.w4ax_gemm import rescale_sum, w4ax_gemm_ref


def random_weight(n, k, group_size, slices=1, perm=True, share=0.3):
    shared = tiny.input_order(k, slices, share, perm)
    t = tiny.linear(n, k, ck.CometFormat(group_size=group_size), shared)
    return LinearWeight(t[ck.WEIGHT_PACKED], t[ck.WEIGHT_SCALE], t.get(ck.WEIGHT_GROUP_SCALE), group_size,
                        t[ck.ACT_BITS_NAME], t.get(ck.INPUT_PERM))


def dense(weight):
    """The float64 matrix in the model's channel order."""
    integers = ck.integer_weight(weight.packed, weight.group_scale, weight.group_size)
    w = integers.double() * weight.scale[:, None].double()
    if weight.perm is None:
        return w
    out = torch.empty_like(w)
    out[:, weight.perm.long()] = w
    return out


@pytest.mark.parametrize("group_size", ck.GROUP_SIZES)
@pytest.mark.parametrize("k, slices", [(128, 1), (576, 1), (200, 1), (512, 2), (1536, 4)])
@pytest.mark.parametrize("perm", [True, False])
def test_sorting_blocks_changes_nothing_but_the_order(group_size, k, slices, perm):
    torch.manual_seed(0)
    weight = random_weight(24, k, group_size, slices, perm)
    after, split = sort_blocks(weight)
    assert torch.equal(dense(weight), dense(after))
    bits = after.act_bits.repeat_interleave(ck.BLOCK)[:k]
    assert bool((bits[:split] == 4).all()) and bool((bits[split:] == 8).all())


@pytest.mark.parametrize("low_bits", [4, 8])
@pytest.mark.parametrize("group_size", ck.GROUP_SIZES)
@pytest.mark.parametrize("m, n, k", [(1, 64, 576), (3, 40, 200), (17, 128, 1536), (0, 64, 128), (5, 33, 128)])
def test_cpu_linear_equals_the_reference_bit_for_bit(low_bits, group_size, m, n, k):
    torch.manual_seed(1)
    weight = random_weight(n, k, group_size)
    x, bias = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16)
    after, split = sort_blocks(weight)
    codes, scales = quantize_activation_ref(x, after.perm, split, low_bits)
    integers = ck.integer_weight(after.packed, after.group_scale, group_size)
    expect = w4ax_gemm_ref(codes, scales, integers, after.scale, split, bias, x.dtype)
    assert torch.equal(make_linear_kernel(weight, low_bits)(x, bias), expect)


@pytest.mark.parametrize("low_bits, bound", [(8, 1e-2), (4, 1.6e-1)])
def test_error_against_float64_is_that_of_activation_rounding(low_bits, bound):
    torch.manual_seed(2)
    weight = random_weight(256, 1024, 64)
    x = torch.randn(64, 1024)
    y, exact = make_linear_kernel(weight, low_bits)(x, None).double(), x.double() @ dense(weight).T
    error = (y - exact).norm() / exact.norm()
    assert bound / 20 < error < bound


def test_only_int8_blocks_or_only_int4_blocks():
    for bits in (4, 8):
        weight = random_weight(32, 256, 128)._replace(act_bits=torch.full((2,), bits, dtype=torch.uint8))
        x = torch.randn(4, 256)
        y, exact = make_linear_kernel(weight, 8)(x, None).double(), x.double() @ dense(weight).T
        assert (y - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("bits", [4, 8])
def test_activation_codes(bits):
    x = torch.randn(7, 300) * torch.logspace(-6, 4, 7)[:, None]
    x[3] = 0
    codes, scales = quantize_activation_ref(x, None, 128, bits)
    assert codes[:, :128].abs().max() <= QMAX[bits] and codes[:, 128:].abs().max() <= 127
    restored = torch.cat([codes[:, :128] * scales[:, :1], codes[:, 128:] * scales[:, 1:]], 1)
    step = torch.cat([scales[:, :1].expand(-1, 128), scales[:, 1:].expand(-1, 172)], 1)
    largest = step * torch.tensor([QMAX[bits]] * 128 + [127] * 172)
    clipped = x.abs() > 1.0001 * largest
    assert bool(((restored - x).abs() <= 0.5001 * step + 1e-30)[~clipped].all())
    assert torch.equal(restored[clipped], largest[clipped] * x[clipped].sign())
    assert int(clipped[:, 128:].sum()) == 0 and bool(clipped.any()) == (bits == 4)
    assert not bool(codes[3].any()) and not bool(scales[3].any())


def test_four_bits_saturate_at_three_quarters_of_the_largest_magnitude():
    x = torch.tensor([[8.0, -8.0, 7.0, 6.0, -3.0, 0.4, 0.5, 0.0]])
    codes, scales = quantize_activation_ref(x, None, 8, 4)
    assert torch.allclose(scales, torch.tensor(0.75 * 8 / 7))
    assert codes.tolist() == [[7, -7, 7, 7, -4, 0, 1, 0]]


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_of_a_row_differ_by_a_power_of_two(bits):
    """One scale keeps its finest step, the other grows by less than twice, unless their ratio is out of bounds."""
    low = torch.tensor([1.0, 1.0, 1.0, 3.0, 0.0, 2.0, 0.0, 1.0, 5.0])
    high = torch.tensor([7.9, 1.0, 1e9, 1.1, 2.0, 0.0, 0.0, 0.7, 1e-9])
    scales = align_scales(low, high, bits)
    shift = torch.log2(scales[:, 1] / scales[:, 0])[[0, 1, 2, 3, 4, 5, 7, 8]]
    assert torch.equal(shift, shift.round())
    assert shift.max() == MAX_SHIFT and shift.min() == (0 if bits == 8 else MIN_SHIFT)
    assert bool((scales[:, 0] >= low).all() and (scales[:, 1] >= high).all())
    kept, grown = (1, 0) if bits == 8 else (0, 1)
    given = torch.stack((low, high), 1)
    assert scales[0, kept] == given[0, kept] and scales[0, grown] < 2 * given[0, grown]
    assert not bool(scales[6].any())


def test_sum_in_units_of_the_second_scale():
    low = torch.tensor([[-7, 7, 100, -(2**31) // 16]], dtype=torch.int32)
    for shift, expect in ((1, [-3, 4, 50, -(2**27) // 2]), (0, low[0].tolist()), (-2, [-28, 28, 400, None])):
        found = rescale_sum(low, torch.tensor([[3.0, 3.0 * 2.0**shift]]))[0].tolist()
        assert [f for f, e in zip(found, expect, strict=True) if e is not None] == [e for e in expect if e is not None]


@pytest.mark.parametrize("n, k", [(6144, 4096), (4096, 14336), (2560, 4096), (57344, 8192)])
def test_warm_up_meets_every_tile(n, k):
    """`compile_kernels` tries a few of the possible batch sizes; serving must not find a tile that it left out."""
    tiles = {m: choose_tile(torch.device("cpu"), "hopper", n, k, m, 64) for m in range(1, 2049)}
    assert {tiles[m] for m in batch_sizes(2048)} == set(tiles.values())
    assert batch_sizes(3) == [3, 2, 1]
