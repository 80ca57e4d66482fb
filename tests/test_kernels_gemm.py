# SPDX-License-Identifier: Apache-2.0
"""W4Ax GEMM: packing, the plain Triton kernel (interpreter or GPU), the Hopper kernel (GPU), the custom ops."""

import random

import pytest
import torch
from kernel_testing import DEVICE, GPU, HOPPER, needs_gpu, needs_hopper, needs_kernels

from vllm_comet import checkpoint as ck
from vllm_comet.kernels import ops
from vllm_comet.kernels.act_quant import code_sums_ref, padded_k, quantize_activation_ref
from vllm_comet.kernels.tiles import Entry, Tile, choose_tile, existing_entries, nearest, save_table
from vllm_comet.kernels.w4ax_gemm import pack_weight, padded_rows, unpack_tiles, w4ax_gemm_ref, w4ax_gemm_triton


def random_layer(n, k, group_size, seed, extreme=False):
    """Checkpoint tensors of a layer: packed weight, group scales, channel scales, bias."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (n, k // 8), generator=generator, dtype=torch.int64).to(torch.int32)
    groups = None
    if group_size != -1:
        groups = torch.randint(1, 17, (n, ck.num_groups(k, group_size)), generator=generator, dtype=torch.uint8)
    if extreme:  # q = 0 with g = 16 is −128, the largest magnitude there is
        packed.zero_()
        if groups is not None:
            groups.fill_(16)
    scale, bias = torch.rand(n, generator=generator) + 0.1, torch.randn(n, generator=generator)
    return [None if t is None else t.to(DEVICE) for t in (packed, groups, scale, bias)]


def random_codes(m, k, split, seed, extreme=False):
    """int8 codes ``[M, Kpad]`` with garbage behind K, and scales; row 0 is all zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (m, padded_k(k)), generator=generator, dtype=torch.int8)
    scales = torch.rand(m, 2, generator=generator) + 0.01
    if extreme:
        codes.fill_(127)
    elif m > 1:
        codes[0, :k], scales[0] = 0, 0
    if split == k:
        scales[:, 1] = 0
    return codes.to(DEVICE), scales.to(DEVICE)


def check(gemm, layout, m, n, k, split, group_size, tile, bias=True, dtype=torch.float32, extreme=False, sums=False):
    """The kernel's bits equal the reference's, twice, and its counters are back at zero.

    sums: whether the kernel is given the sums of the codes, with the garbage behind K.
    """
    packed, groups, scale, b = random_layer(n, k, group_size, n + k, extreme)
    b = b.to(dtype) if bias else None
    weight = pack_weight(packed, groups, group_size, split, layout)
    codes, act_scales = random_codes(m, k, split, m, extreme)
    code_sums = code_sums_ref(codes, -(-split // 128) * 128) if sums else None
    integers = ck.integer_weight(packed, groups, group_size)
    expected = w4ax_gemm_ref(codes[:, :k], act_scales, integers, scale, split, b, dtype)
    for _ in range(2):
        torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE)  # freed at once: the output takes its memory
        y = gemm(codes, act_scales, weight, scale, b, dtype, tile, code_sums)
        assert y.shape == (m, n) and y.dtype == dtype
        wrong = int((y != expected).sum())
        case = f"M={m} N={n} K={k} split={split} g={group_size} sums={sums} {tile}"
        assert not wrong, f"{wrong} of {y.numel()} differ: {case}"
    assert not weight.counters.any()


@pytest.mark.parametrize("layout", ["triton", "hopper"])
@pytest.mark.parametrize("group_size", [128, 64, -1])
@pytest.mark.parametrize("n,k", [(64, 128), (70, 200), (130, 392)])
def test_pack_round_trip(layout, group_size, n, k, monkeypatch):
    monkeypatch.setattr("vllm_comet.kernels.w4ax_gemm.PACK_SLICE_BYTES", 64 * 512)  # several slices
    packed, groups, _, _ = random_layer(n, k, group_size, 1)
    weight = pack_weight(packed, groups, group_size, 128, layout)
    assert torch.equal(unpack_tiles(weight), ck.integer_weight(packed, groups, group_size))
    assert weight.packed.numel() * 4 == padded_rows(n) * -(-k // 128) * 64


@pytest.mark.parametrize("split", [100, -128, 512])
def test_pack_refuses_split(split):
    with pytest.raises(ValueError, match="split"):
        pack_weight(*random_layer(64, 256, 128, 1)[:2], 128, split, "triton")


def test_pack_refuses_group_scale():
    with pytest.raises(ValueError, match="group_size is -1"):
        pack_weight(*random_layer(64, 256, 128, 1)[:2], -1, 128, "triton")


@needs_kernels
@pytest.mark.parametrize("m,n,k,split,group_size,tile", [
    (1, 70, 256, 128, 128, Tile(16, 64, 2, 4, 1)),
    (7, 130, 392, 256, 64, Tile(16, 64, 3, 4, 1)),  # a short last block, slices on both sides of the segment boundary
    (20, 64, 640, 128, 128, Tile(16, 128, 3, 4, 1)),  # a slice that holds the boundary
    (33, 100, 520, 520, -1, Tile(32, 64, 2, 4, 1)),
    (5, 64, 256, 0, 64, Tile(16, 64, 1, 4, 1)),
    (40, 200, 384, 256, -1, Tile(16, 64, 1, 4, 1, group_n=2)),
])  # fmt: skip
def test_triton_kernel(m, n, k, split, group_size, tile):
    check(w4ax_gemm_triton, "triton", m, n, k, split, group_size, tile)


@needs_kernels
def test_triton_kernel_extremes():
    check(w4ax_gemm_triton, "triton", 3, 64, 512, 256, 128, Tile(16, 64, 2, 4, 1), extreme=True)
    check(w4ax_gemm_triton, "triton", 3, 64, 512, 256, -1, Tile(16, 64, 2, 4, 1), bias=False, extreme=True)


def fuzz_cases(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        m = rng.choice([1, 7, 16, 63, 118, 152, rng.randint(1, 600)])
        n, k = rng.choice([rng.randint(1, 1500), 64 * rng.randint(1, 40)]), 8 * rng.randint(1, 400)
        split = rng.choice([k, 0, 128 * rng.randint(0, k // 128)])
        yield m, n, k, split, rng.choice([128, 64, -1]), rng


@needs_gpu
def test_fuzz_triton():
    for m, n, k, split, group_size, rng in fuzz_cases(24, 0):
        tiles = Tile(16, 64, 3, 4, 4), Tile(32, 128, 2, 4, 3), Tile(64, 64, 1, 4, 3), Tile(128, 128, 1, 8, 3)
        tile = rng.choice(tiles)
        dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
        check(w4ax_gemm_triton, "triton", m, n, k, split, group_size, tile, rng.random() < 0.5, dtype)


HOPPER_TILES = [
    Tile(8, 64, 4, 4, 4, depth=4, registers=128), Tile(16, 64, 3, 4, 4), Tile(16, 128, 2, 8, 2, depth=8),
    Tile(32, 64, 5, 4, 4, depth=2), Tile(64, 64, 2, 4, 3, depth=4, registers=168), Tile(64, 128, 3, 4, 3, depth=4),
    Tile(64, 128, 1, 8, 4, depth=2, registers=128), Tile(128, 64, 4, 4, 3, depth=2), Tile(128, 128, 1, 8, 3, depth=4),
    Tile(128, 128, 1, 4, 3), Tile(256, 128, 1, 8, 3), Tile(128, 128, 2, 4, 3), Tile(64, 64, 3, 4, 3, depth=4, ahead=2),
    Tile(128, 128, 1, 4, 2, depth=2, ahead=1), Tile(256, 128, 2, 8, 3, depth=2, ahead=1), Tile(128, 128, 1, 4, 6),
    Tile(128, 128, 1, 8, 3, depth=2, registers=128, ahead=1), Tile(128, 128, 1, 8, 6, registers=128),
]  # fmt: skip


@needs_hopper
@pytest.mark.parametrize("tile", HOPPER_TILES,
                         ids=lambda t: f"{t.block_m}x{t.block_n}w{t.warps}s{t.stages}d{t.depth}a{t.ahead}")
def test_fuzz_hopper(tile):
    from vllm_comet.kernels.w4ax_gemm_hopper import w4ax_gemm_hopper

    for m, n, k, split, group_size, rng in fuzz_cases(6, tile.block_m * tile.block_n + tile.warps):
        dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
        bias = rng.random() < 0.5
        for sums in (False, True):
            check(w4ax_gemm_hopper, "hopper", m, n, k, split, group_size, tile, bias, dtype, sums=sums)
    for sums in (False, True):
        check(w4ax_gemm_hopper, "hopper", 9, 192, 1024, 512, 128, tile, extreme=True, sums=sums)


SMALL_TILES = [Tile(*tile, form="small") for tile in (
    (8, 16, 1, 8, 4), (8, 32, 1, 8, 8), (16, 64, 1, 16, 4), (16, 32, 1, 16, 2), (32, 64, 1, 8, 4), (64, 64, 1, 8, 2))]


@needs_hopper
@pytest.mark.parametrize("tile", SMALL_TILES, ids=lambda t: f"{t.block_m}x{t.block_n}w{t.warps}")
def test_fuzz_hopper_small(tile):
    from vllm_comet.kernels.w4ax_gemm_hopper_small import w4ax_gemm_hopper_small

    for m, n, k, split, group_size, rng in fuzz_cases(6, tile.block_m * tile.block_n + tile.warps):
        dtype = rng.choice([torch.bfloat16, torch.float16, torch.float32])
        check(w4ax_gemm_hopper_small, "hopper", m, n, k, split, group_size, tile, rng.random() < 0.5, dtype)
    check(w4ax_gemm_hopper_small, "hopper", 5, 192, 1024, 384, -1, tile, extreme=True)


# ----------------------------------------------------------------------------------------------------------- custom ops
def linear_operands(m, n, k, split, group_size=128):
    packed, groups, scale, bias = random_layer(n, k, group_size, 3)
    weight = pack_weight(packed, groups, group_size, split)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16).to(DEVICE)
    return x, weight, ck.integer_weight(packed, groups, group_size), scale, bias


@pytest.mark.parametrize("m", [0, 1, 5, 118, 600] if GPU else [0, 1, 5])
@pytest.mark.parametrize("group_size", [128, 64, -1])
def test_linear_ops(m, group_size):
    x, weight, integers, scale, bias = linear_operands(m, 200, 392, 256, group_size)
    perm = torch.randperm(392, generator=torch.Generator().manual_seed(0)).to(torch.int32).to(DEVICE)
    codes, act_scales, sums = torch.ops.vllm_comet.quantize_activation(x, perm, 256, 4)
    expected_codes, expected_scales = quantize_activation_ref(x, perm, 256, 4)
    assert torch.equal(codes[:, :392], expected_codes) and torch.equal(act_scales, expected_scales)
    y = ops.w4ax_linear(codes, act_scales, sums, weight, scale, bias)
    assert torch.equal(y, w4ax_gemm_ref(expected_codes, expected_scales, integers, scale, 256, bias))


def test_ops_have_fake_implementations():
    x, weight, _, scale, bias = linear_operands(3, 64, 256, 128)
    quantized = torch.ops.vllm_comet.quantize_activation(x, None, 128, 8)
    arguments = (*quantized, weight.packed, weight.group_scale, weight.counters, scale, bias, 64, 256, 128, 128,
                 weight.layout, torch.bfloat16)  # fmt: skip
    torch.library.opcheck(torch.ops.vllm_comet.w4ax_linear.default, arguments)
    torch.library.opcheck(torch.ops.vllm_comet.quantize_activation.default, (x, None, 128, 8))
    torch.library.opcheck(torch.ops.vllm_comet.silu_mul_quantize.default, (x, None, 128, 8))
    norm = (x, x.clone(), torch.ones(256, dtype=x.dtype, device=DEVICE), 1e-5, None, 128, 8)
    torch.library.opcheck(torch.ops.vllm_comet.rms_norm_quantize.default, norm)


def test_second_import_registers_nothing():
    import importlib

    importlib.reload(ops)
    assert torch.ops.vllm_comet.w4ax_linear.default._schema.name == "vllm_comet::w4ax_linear"


@needs_gpu
@pytest.mark.parametrize("m", [1, 40, 300])
def test_cuda_graph_and_compile(m):
    x, weight, integers, scale, _ = linear_operands(m, 4096, 4096, 3584)

    def layer(x):
        return ops.w4ax_linear(*torch.ops.vllm_comet.quantize_activation(x, None, 3584, 8), weight, scale)

    expected = w4ax_gemm_ref(*quantize_activation_ref(x, None, 3584, 8), integers, scale, 3584)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain = [layer(x) for _ in range(6)]
    for y in chain:
        y.fill_(float("nan"))
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in chain)


@needs_gpu
def test_overlapping_launches():
    """Programmatic launch lets neighbours overlap: a chain where each GEMM reads the one before gives the same bits."""
    _, weight, integers, scale, _ = linear_operands(1, 4096, 4096, 3584)
    scale = scale * 1e-4
    x = torch.randn(16, 4096, dtype=torch.bfloat16, device=DEVICE)
    y, expected = x, x
    for _ in range(12):
        y = ops.w4ax_linear(*torch.ops.vllm_comet.quantize_activation(y, None, 3584, 8), weight, scale)
    for _ in range(12):
        expected = w4ax_gemm_ref(*quantize_activation_ref(expected, None, 3584, 8), integers, scale, 3584)
    assert torch.equal(y, expected) and torch.isfinite(y).all() and y.any()


def test_tile_table_keeps_other_entries(tmp_path):
    entries = [Entry(4096, 4096, m, Tile(64, 64, 1, 4, 3, ahead=m), g) for m in (16, 64) for g in (None, 64)]
    save_table(tmp_path / "gpu.json", "a GPU", "hopper", entries)
    assert list(existing_entries(tmp_path / "gpu.json", "hopper").values()) == entries
    assert existing_entries(tmp_path / "gpu.json", "triton") == {} == existing_entries(tmp_path / "none.json", "hopper")


@pytest.mark.parametrize("n,m,group_size,expected", [
    (4096, 1, 128, (4096, 8, None)), (4096, 9, 128, (4096, 64, None)), (4096, 64, 64, (4096, 64, 64)),
    (9000, 1, 64, (4096, 8, None)), (9000, 60, 64, (4096, 64, 64)), (9000, 100, -1, (8192, 64, None)),
])  # fmt: skip
def test_nearest_entry(n, m, group_size, expected):
    """A shape that was measured for some M only doesn't lend the others a tile for larger ones."""
    table = tuple(Entry(n, 4096, m, Tile(8, 64, 1, 4, 3), g)
                  for n, m, g in ((4096, 8, None), (4096, 64, None), (4096, 64, 64), (8192, 64, None)))
    found = nearest(table, n, 4096, m, group_size)
    assert (found.n, found.m, found.group_size) == expected


def test_tile_choice():
    tile = choose_tile(torch.device("cpu"), "triton", 4096, 4096, 1, 128)
    assert tile.block_m == 16 and tile.split >= 1
    assert choose_tile(torch.device("cpu"), "triton", 5000, 4096, 100000, 64).block_m == 128
    assert HOPPER or choose_tile(torch.device("cpu"), "triton", 64, 64, 1, -1).split == 1
