# SPDX-License-Identifier: Apache-2.0
"""Fine-grained mixed-precision activations (FMPQ, COMET §4): channel order, error of each choice, INT8 budget.

Outlier channels come last, so that 128-channel blocks are either all ordinary (INT4) or all outliers (INT8). Where a
layer is row-parallel the order stays inside each tensor-parallel slice, and every slice has the same number of INT8
blocks, so that ranks do equal work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_comet.checkpoint import BLOCK, num_blocks
from vllm_comet.kernels.act_quant import quantize_activation_ref


def outlier_last(score: torch.Tensor, slices: int) -> torch.Tensor:
    """Permutation ``[K]`` int64 that sorts ``score`` upwards inside each of ``slices`` equal parts of K."""
    parts = score.view(slices, -1)
    start = torch.arange(slices, device=score.device).unsqueeze(1) * parts.shape[1]
    return (torch.argsort(parts, dim=1, stable=True) + start).flatten()


def act_bits(k: int, slices: int, int8_blocks: int) -> torch.Tensor:
    """uint8 ``[ceil(K/128)]``: the last ``int8_blocks`` blocks of every slice have 8 bits, the others 4."""
    bits = torch.full((slices, num_blocks(k // slices)), 4, dtype=torch.uint8)
    if int8_blocks:
        bits[:, -int8_blocks:] = 8
    return bits.flatten()


def int8_channels(k: int, slices: int, int8_blocks: int) -> int:
    """Channels in INT8 blocks; the last block of a slice may be short."""
    width = k // slices
    return slices * max(0, width - max(0, num_blocks(width) - int8_blocks) * BLOCK)


def error_curve(rows: torch.Tensor, weight: torch.Tensor, slices: int, low_bits: int) -> list[float]:
    """Relative squared output error for 0, 1, 2 … INT8 blocks a slice, when the other blocks have ``low_bits``.

    rows: float32 ``[R, K]`` tokens; weight: float32 ``[N, K]``, all readers of the input; both in stored order.
    """
    k = rows.shape[1]
    exact = (rows @ weight.T).square().sum().clamp_min(1e-30)
    curve = []
    for count in range(num_blocks(k // slices) + 1):
        restored = round_trip_activation(rows, act_bits(k, slices, count), low_bits)
        curve.append(((restored - rows) @ weight.T).square().sum() / exact)
    return torch.stack(curve).tolist()  # one wait for the device


def segments(bits: torch.Tensor, k: int) -> tuple[torch.Tensor, int]:
    """Order ``[K]`` that puts the INT4 blocks of all slices before the INT8 ones, and where the latter begin."""
    high = bits.repeat_interleave(BLOCK)[:k] == 8
    return torch.argsort(high.to(torch.uint8), stable=True), int((~high).sum())


def round_trip_activation(rows: torch.Tensor, bits: torch.Tensor, low_bits: int) -> torch.Tensor:
    """``rows`` ``[R, K]`` in stored order after quantisation in two segments, float32; low_bits: of the INT4 blocks."""
    order, split = segments(bits, rows.shape[1])
    order = order.to(rows.device)
    codes, scales = quantize_activation_ref(rows, order, split, low_bits)
    restored = codes.to(torch.float32)
    restored[:, :split] *= scales[:, :1]
    restored[:, split:] *= scales[:, 1:]
    result = torch.empty_like(restored)
    result[:, order] = restored
    return result


@dataclass(frozen=True)
class Candidate:
    """One activation in the budget: width, linears that read it, slices, and error by number of INT8 blocks a slice."""

    k: int
    readers: int
    slices: int
    curve: tuple[float, ...]

    def channels(self, int8_blocks: int) -> int:
        """INT8 input channels, counted once for each reader."""
        return self.readers * int8_channels(self.k, self.slices, int8_blocks)


def allocate(candidates: list[Candidate], share: float) -> list[int]:
    """INT8 blocks a slice for each candidate: greedily where a channel lowers the error most, mean share ≤ ``share``.

    The mean is over the input channels of all linears. A step may take several blocks at once, because outliers
    that fill two blocks pay only when both are INT8.
    """
    budget = share * sum(c.readers * c.k for c in candidates)
    chosen, spent = [0] * len(candidates), 0
    while True:
        steps = [s for i, c in enumerate(candidates) for s in _steps(i, c, chosen[i]) if s[1] <= budget - spent]
        if not steps:
            return chosen
        gain, cost, index, count = max(steps, key=lambda s: (s[0] / s[1], -s[2], -s[3]))
        chosen[index], spent = count, spent + cost


def _steps(index: int, candidate: Candidate, current: int) -> list[tuple[float, int, int, int]]:
    """(error saved, channels paid, index, new count) of every larger count that saves something."""
    steps = []
    for count in range(current + 1, len(candidate.curve)):
        gain = candidate.curve[current] - candidate.curve[count]
        cost = candidate.channels(count) - candidate.channels(current)
        if gain > 0 and cost > 0:
            steps.append((gain, cost, index, count))
    return steps
