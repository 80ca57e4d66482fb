# SPDX-License-Identifier: Apache-2.0
"""The two-level 4-bit grid: choice of its scales, rounding to it, and the tensors a quantised linear is stored as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_comet import checkpoint as fmt

LOW, HIGH = -8, 7
_STEP = 0.05
"""Spacing of trial scales, relative."""
_SHRINK, _GROW = -16, 6
"""Trial scales of a group: (1 + _STEP)**i times the one that reaches its largest weight, i from _SHRINK to _GROW."""
_ROW_TRIALS = 48


@dataclass
class Grid:
    """Scales of a weight ``[N, K]``: row float32 ``[N]`` (c) and group uint8 ``[N, G]`` (g; None means g ≡ 16)."""

    row: torch.Tensor
    group: torch.Tensor | None
    group_size: int

    @classmethod
    def cat(cls, parts: list[Grid]) -> Grid:
        """The grid of all their rows."""
        groups = [part.group for part in parts if part.group is not None]
        row = torch.cat([part.row for part in parts])
        return cls(row, torch.cat(groups) if groups else None, parts[0].group_size)

    def to(self, device: torch.device) -> Grid:
        return Grid(self.row.to(device), None if self.group is None else self.group.to(device), self.group_size)

    def steps(self, k: int) -> torch.Tensor:
        """c·g for every weight: float32 ``[N, K]``."""
        if self.group is None:
            return (self.row * 16).unsqueeze(1).expand(-1, k)
        return (self.row.unsqueeze(1) * self.group).repeat_interleave(self.group_size, dim=1)[:, :k]


@dataclass
class QuantizedLinear:
    """A linear's weight on its grid, in stored order; ``perm`` ``[K]`` int64 or None if folded."""

    grid: Grid
    codes: torch.Tensor  # uint8 [N, K], 0..15
    perm: torch.Tensor | None = None

    def dequantize(self) -> torch.Tensor:
        """Float32 ``[N, K]`` in stored order."""
        return (self.codes.to(torch.float32) + LOW) * self.grid.steps(self.codes.shape[1])

    def permute_rows(self, order: torch.Tensor) -> QuantizedLinear:
        """The same linear with its output channels in ``order``."""
        group = None if self.grid.group is None else self.grid.group[order]
        return QuantizedLinear(Grid(self.grid.row[order], group, self.grid.group_size), self.codes[order], self.perm)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the checkpoint stores, without ``act_bits``."""
        stored = {fmt.WEIGHT_PACKED: fmt.pack_int4(self.codes), fmt.WEIGHT_SCALE: self.grid.row}
        if self.grid.group is not None:
            stored[fmt.WEIGHT_GROUP_SCALE] = self.grid.group
        if self.perm is not None:
            stored[fmt.INPUT_PERM] = self.perm.to(torch.int32)
        return {name: tensor.cpu().contiguous() for name, tensor in stored.items()}


def dequantize(tensors: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """Float32 weight ``[N, K]`` in the model's channel order, from the stored tensors of one linear."""
    integers = fmt.integer_weight(tensors[fmt.WEIGHT_PACKED], tensors.get(fmt.WEIGHT_GROUP_SCALE), group_size)
    stored = integers.to(torch.float32) * tensors[fmt.WEIGHT_SCALE].unsqueeze(1)
    perm = tensors.get(fmt.INPUT_PERM)
    if perm is None:
        return stored
    weight = torch.empty_like(stored)
    weight[:, perm.to(torch.int64)] = stored
    return weight


def round_to_grid(weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Nearest codes 0..15 (uint8) of ``weight`` ``[N, K]``."""
    return ((weight / grid.steps(weight.shape[1])).round().clamp(LOW, HIGH) - LOW).to(torch.uint8)


def search_grid(weight: torch.Tensor, importance: torch.Tensor, group_size: int) -> Grid:
    """Scales that minimise ``Σ_k importance[k] · (W − Ŵ)²[n, k]`` under round-to-nearest, row by row.

    weight: float32 ``[N, K]`` in stored order; importance: float32 ``[K]``, the Hessian's diagonal. Each group's error
    is tabulated over trial scales around the one that covers its range (each sign has its own limit, −8 or 7); then
    each row takes the c whose multiples c·1 … c·16 serve its groups best.
    """
    n, k = weight.shape
    width = k if group_size == -1 else group_size
    pad = -k % width
    groups = F.pad(weight, (0, pad)).view(n, -1, width)
    weights = F.pad(importance, (0, pad)).view(-1, width)
    cover = torch.maximum(groups.amax(-1) / HIGH, groups.amin(-1) / LOW).clamp_min(1e-12)  # [N, G]
    factors = (1 + _STEP) ** torch.arange(_SHRINK, _GROW + 1, dtype=torch.float32, device=weight.device)
    errors = torch.stack([_group_error(groups, weights, cover * factor) for factor in factors])  # [trials, N, G]
    if group_size == -1:
        return Grid(cover[:, 0] * factors[errors[:, :, 0].argmin(0)] / 16, None, -1)
    return _fit_row_scale(cover, errors, group_size)


def _group_error(groups: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.unsqueeze(-1)
    rounded = (groups / scale).round_().clamp_(LOW, HIGH).mul_(scale)
    return rounded.sub_(groups).square_().mul_(weights).sum(-1)


def _fit_row_scale(cover: torch.Tensor, errors: torch.Tensor, group_size: int) -> Grid:
    """Pick c per row among trials, and g in 1..16 per group, by the tabulated errors ``[trials, N, G]``."""
    multiples = torch.arange(1, 17, dtype=torch.float32, device=cover.device)
    largest = cover.amax(1, keepdim=True)  # [N, 1]
    best = torch.full(cover.shape[:1], torch.inf, device=cover.device)
    row = torch.empty_like(best)
    group = torch.empty_like(cover, dtype=torch.uint8)
    for trial in torch.linspace(0.5, 2.0, _ROW_TRIALS).tolist():
        c = largest / 16 * trial
        error, choice = _lookup(errors, c.unsqueeze(-1) * multiples / cover.unsqueeze(-1)).min(-1)  # [N, G]
        total = error.sum(1)
        better = total < best
        best = torch.where(better, total, best)
        row = torch.where(better, c[:, 0], row)
        group = torch.where(better.unsqueeze(1), (choice + 1).to(torch.uint8), group)
    return Grid(row, group, group_size)


def _lookup(errors: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Error at scale ``ratio · cover`` ``[N, G, 16]``: the nearest trial's; beyond the table it grows with distance."""
    position = ratio.log() / torch.tensor(1 + _STEP).log() - _SHRINK
    nearest = position.round().clamp(0, errors.shape[0] - 1)
    value = errors.permute(1, 2, 0).gather(-1, nearest.to(torch.int64))
    return value * (1 + _STEP) ** (2 * (position - nearest).abs().sub(0.5).clamp_min(0))
