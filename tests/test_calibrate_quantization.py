# SPDX-License-Identifier: Apache-2.0
"""Grid search, GPTQ, channel order and INT8 budget on their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate.fmpq import (
    Candidate,
    act_bits,
    allocate,
    error_curve,
    int8_channels,
    outlier_last,
    round_trip_activation,
)
from calibrate.gptq import (
    Compensation,
    _invert_cholesky_,
    corrected_targets,
    descend,
    gptq,
    hessian_error,
    output_errors,
    refit_rows,
)
from calibrate.grid import QuantizedLinear, dequantize, round_to_grid, search_grid
from calibrate.rows import RowQuantizer
from vllm_comet import checkpoint as fmt

N, K, TOKENS = 48, 200, 800


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, correlated inputs with outlier channels, and their Hessian."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    mixing = torch.randn(K, K, generator=generator) * 0.15 + torch.eye(K)
    x = torch.randn(TOKENS, K, generator=generator) @ mixing
    x[:, ::37] *= 20
    return weight, x, x.T @ x / TOKENS


def stored(weight: torch.Tensor, codes: torch.Tensor, grid) -> torch.Tensor:
    return (codes.to(torch.float32) - 8) * grid.steps(weight.shape[1])


@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
def test_gptq_beats_rounding_to_nearest(problem, group_size):
    weight, _, hessian = problem
    grid = search_grid(weight, hessian.diagonal(), group_size)
    nearest = stored(weight, round_to_grid(weight, grid), grid)
    codes = gptq(weight, Compensation.of(hessian, 0.01, "layer"), grid)
    compensated = hessian_error(stored(weight, codes, grid) - weight, hessian)
    assert compensated < 0.7 * hessian_error(nearest - weight, hessian)
    refitted = refit_rows(weight, hessian, grid, codes)
    found = hessian_error(stored(weight, codes, refitted) - weight, hessian)
    assert found < compensated
    descended = descend(weight, hessian, refitted, codes, sweeps=3)
    assert hessian_error(stored(weight, codes, descended) - weight, hessian) < 0.97 * found


@pytest.mark.parametrize("group_size", [64, 128])
def test_scales_chosen_for_compensated_errors_serve_gptq_better(problem, group_size):
    weight, _, hessian = problem
    compensation = Compensation.of(hessian, 0.01, "layer")

    def error(importance: torch.Tensor) -> float:
        grid = search_grid(weight, importance, group_size)
        return hessian_error(stored(weight, gptq(weight, compensation, grid), grid) - weight, hessian)

    assert error(compensation.importance) < error(hessian.diagonal())


@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
def test_searched_scales_beat_the_ones_that_cover_the_range(problem, group_size):
    weight, _, hessian = problem
    importance = hessian.diagonal()
    grid = search_grid(weight, importance, group_size)
    width = K if group_size == -1 else group_size
    cover = torch.stack([part.abs().amax(1) / 7 for part in weight.split(width, dim=1)], dim=1)
    covering = cover.repeat_interleave(width, dim=1)[:, :K]
    plain = (weight / covering).round().clamp(-8, 7) * covering

    def error(restored: torch.Tensor) -> float:
        return float(((restored - weight).square() * importance).sum())

    assert error(stored(weight, round_to_grid(weight, grid), grid)) < error(plain)


@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
def test_stored_tensors_follow_the_format_and_dequantise_to_the_weight(problem, group_size):
    weight, _, hessian = problem
    perm = outlier_last(hessian.diagonal(), 1)
    grid = search_grid(weight[:, perm], hessian.diagonal()[perm], group_size)
    linear = QuantizedLinear(grid, round_to_grid(weight[:, perm], grid), perm)
    tensors = linear.tensors()
    spec = fmt.linear_tensors(N, K, group_size)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {name: spec[name] for name in tensors}
    expected = torch.empty_like(weight)
    expected[:, perm] = stored(weight, linear.codes, grid)
    torch.testing.assert_close(dequantize(tensors, group_size), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("group_size", [128, -1])
def test_rows_quantise_alone_as_together(problem, group_size, devices, monkeypatch):
    weight, _, hessian = problem
    compensation, cpu = Compensation.of(hessian, 0.01, "layer"), torch.device("cpu")
    whole = RowQuantizer(hessian, compensation, group_size, (cpu,)).quantize(weight)
    monkeypatch.setattr("calibrate.rows.ROUNDED_BYTES", 4 * weight.shape[1] * 7)
    parts = RowQuantizer(hessian, compensation, group_size, (cpu,) * devices).quantize(weight)
    assert len(weight) % 7 and len(weight) > 7 * devices and parts.codes.shape == whole.codes.shape
    assert (parts.codes != whole.codes).float().mean() < 0.01  # sums of other lengths round otherwise
    torch.testing.assert_close(parts.grid.row, whole.grid.row, rtol=1e-3, atol=0)


@pytest.mark.parametrize("block", [64, 96, 4096])
def test_cholesky_factor_inverted_in_blocks(problem, block):
    hessian = problem[2].double()
    expected = torch.linalg.inv(torch.linalg.cholesky(hessian))
    result = hessian.clone()
    assert _invert_cholesky_(result, block)
    torch.testing.assert_close(result, expected)
    hessian[150, 150] = -1.0
    assert not _invert_cholesky_(hessian, block)


@pytest.mark.gpu
def test_two_gpus_round_as_one(problem):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    weight, _, hessian = (t.to(first) for t in problem)
    compensation = Compensation.of(hessian, 0.01, "layer")
    one = RowQuantizer(hessian, compensation, 64, (first,)).quantize(weight)
    two = RowQuantizer(hessian, compensation, 64, (first, second)).quantize(weight)
    assert two.codes.device == two.grid.row.device == first
    assert (two.codes != one.codes).float().mean() < 0.01
    torch.testing.assert_close(two.grid.row, one.grid.row, rtol=1e-3, atol=0)


def test_channels_that_are_always_zero_are_harmless(problem):
    weight, x, _ = problem
    x[:, 3] = 0
    hessian = x.T @ x / TOKENS
    grid = search_grid(weight, hessian.diagonal(), 64)
    codes = gptq(weight, Compensation.of(hessian, 0.01, "layer"), grid)
    assert hessian_error(stored(weight, codes, grid) - weight, hessian) < 0.05 * hessian_error(weight, hessian)


def test_corrected_target_brings_the_output_nearer_to_the_exact_one(problem):
    weight, exact, _ = problem
    x = exact + 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)) @ torch.ones(K, K) / K
    drift = 0.1 * x[:, :N]
    hessian = x.T @ x / TOKENS
    missing = output_errors([weight], hessian, exact.T @ x / TOKENS, drift.T @ x / TOKENS)
    [target] = corrected_targets([weight], missing, Compensation.of(hessian, 1e-4, "layer"))
    wanted = exact @ weight.T + drift

    def error(w: torch.Tensor) -> float:
        return float((x @ w.T - wanted).square().mean())

    assert error(target) < 0.5 * error(weight)


@given(st.integers(1, 8), st.integers(1, 40), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_outliers_come_last_inside_every_slice(slices, width, seed):
    score = torch.rand(slices * width, generator=torch.Generator().manual_seed(seed))
    perm = outlier_last(score, slices)
    fmt.check_permutation(perm, slices, "perm")
    assert bool((score[perm].view(slices, width).diff(dim=1) >= 0).all())


def test_block_bits_are_last_in_every_slice_and_a_short_block_counts_its_channels():
    assert act_bits(1024, 2, 1).tolist() == [4, 4, 4, 8, 4, 4, 4, 8]
    assert act_bits(576, 1, 2).tolist() == [4, 4, 4, 8, 8]
    assert [int8_channels(576, 1, n) for n in range(6)] == [0, 64, 192, 320, 448, 576]


def test_int8_blocks_lower_the_activation_error(problem):
    weight, x, hessian = problem
    perm = outlier_last(hessian.diagonal(), 1)
    curve = error_curve(x[:, perm], weight[:, perm], 1, low_bits=4)
    assert len(curve) == 3 and curve[0] > 3 * curve[1] > 0 and curve[2] < curve[0] / 50
    in_int8 = error_curve(x[:, perm], weight[:, perm], 1, low_bits=8)
    assert in_int8[0] == in_int8[2] == curve[2]  # one segment, all INT8
    assert in_int8[1] < in_int8[0] / 2 and in_int8[1] < curve[1] / 3  # outliers with a scale of their own
    int8 = round_trip_activation(x[:, perm], act_bits(K, 1, 1), low_bits=8)
    assert float((int8 - x[:, perm]).square().mean()) < 3e-4 * float(x.square().mean())


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_budget_is_respected(seed, share):
    draw = torch.Generator().manual_seed(seed)
    candidates = []
    for k, readers, slices in ((576, 3, 1), (1024, 1, 2), (1536, 2, 1), (4096, 1, 8)):
        blocks = fmt.num_blocks(k // slices)
        curve = torch.rand(blocks + 1, generator=draw).sort(descending=True).values
        candidates.append(Candidate(k, readers, slices, tuple(curve.tolist())))
    chosen = allocate(candidates, share)
    spent = sum(c.channels(n) for c, n in zip(candidates, chosen, strict=True))
    total = sum(c.readers * c.k for c in candidates)
    assert spent <= share * total
    if share == 1:
        assert spent == total


def test_budget_goes_where_it_lowers_the_error_most():
    flat = Candidate(512, 1, 1, (0.02, 0.019, 0.018, 0.017, 0.016))
    steep = Candidate(512, 1, 1, (0.9, 0.5, 0.1, 0.09, 0.08))
    assert allocate([flat, steep], 0.25) == [0, 2]
    assert allocate([flat, Candidate(512, 3, 1, steep.curve)], 0.25) == [1, 1]  # three readers pay thrice
