# SPDX-License-Identifier: Apache-2.0
"""Rounding with error compensation (GPTQ, Frantar et al. 2022) on a fixed two-level grid, and its refinement by
coordinate descent (as in QuantEase, Behdin et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibrate.errors import CalibrationError
from calibrate.grid import LOW, Grid
from calibrate.rounding import COLUMNS, round_columns
from calibrate.stats import reorder

SWEEPS = 4
"""Of coordinate descent. On SmolLM2's layers the error falls by 4, 6, 7 and 8 % with them."""
CORRECTION = 0.5
"""Share of the way to the least squares of :func:`corrected_targets`: all of it fits the calibration text too closely.
W4A8KV4's perplexity is 1.9 % lower for it on SmolLM2-135M (WikiText-2 test; 1.0 % on its valid set), 1.8 % on
Gemma-3-270M."""


@dataclass(frozen=True)
class Compensation:
    """How the rounding error of one input channel is best spread over others, from the Hessian of a layer's input.

    order ``[K]``: channels from the largest Hessian diagonal down, the order of rounding. inverse float32 ``[K, K]``:
    upper triangular U with ``UᵀU`` the inverse of the damped Hessian in that order. importance float32 ``[K]``, stored
    order: what a squared rounding error of a channel costs once it is compensated, ``1 / U[i, i]²``; 0 for a channel
    that is always zero.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float, name: str) -> Compensation:
        """hessian: float32 ``[K, K]`` in stored order. Raises CalibrationError, naming ``name``, if it is singular."""
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        inverse = _inverse_factor(hessian, order, damping, name)
        importance = torch.empty_like(hessian[0])
        importance[order] = inverse.diagonal().square().reciprocal()
        return cls(order, inverse, importance * (hessian.diagonal() > 0))

    def to(self, device: torch.device) -> Compensation:
        return Compensation(self.order.to(device), self.inverse.to(device), self.importance.to(device))

    def solve(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows (H + λI)⁻¹`` for ``rows`` ``[N, K]`` in stored order."""
        result = torch.empty_like(rows)
        result[:, self.order] = rows[:, self.order] @ self.inverse.T @ self.inverse
        return result


def gptq(weight: torch.Tensor, compensation: Compensation, grid: Grid) -> torch.Tensor:
    """Codes 0..15 (uint8 ``[N, K]``) that lower ``tr((W − Ŵ) H (W − Ŵ)ᵀ)`` below what rounding to nearest gives.

    weight: float32 ``[N, K]`` in stored order. Columns are rounded one after the other in the compensation's order, and
    the error of each is spread over those still to come. The scales do not depend on that order, so it leaves no trace
    in the checkpoint.
    """
    order, inverse = compensation.order, compensation.inverse
    weight = weight[:, order]
    steps = grid.steps(weight.shape[1])[:, order]
    codes = torch.empty_like(weight, dtype=torch.uint8)
    for start in range(0, len(order), COLUMNS):
        end = min(start + COLUMNS, len(order))
        coupling = inverse[start:end, start:] / -inverse[start:end, start:end].diagonal().unsqueeze(1)
        rounded, changes = round_columns(weight[:, start:end], steps[:, start:end], coupling[:, : end - start], None)
        codes[:, order[start:end]] = (rounded - LOW).to(torch.uint8)
        weight[:, end:] -= changes @ coupling[:, end - start :]
    return codes


def descend(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor, sweeps: int
) -> Grid:
    """Lower ``tr((W − Ŵ) H (W − Ŵ)ᵀ)`` by changing ``codes`` in place: each to its optimum given all others, column by
    column, ``sweeps`` times; returns ``grid`` with each row's c at its optimum after every one.

    GPTQ chooses a code when those to come are still free; here every code meets all others as they were rounded.
    weight: float32 ``[N, K]``, hessian float32 ``[K, K]``, positive definite, both in stored order.
    """
    k, diagonal = weight.shape[1], hessian.diagonal()
    for _ in range(sweeps):
        steps = grid.steps(k)
        stored = (codes.to(torch.float32) + LOW) * steps
        slope = (stored - weight) @ hessian
        for start in range(0, k, COLUMNS):
            here = slice(start, start + COLUMNS)
            best = stored[:, here] - slope[:, here] / diagonal[here]
            coupling = hessian[here, here] / diagonal[here]
            rounded, changes = round_columns(best, steps[:, here], coupling, stored[:, here])
            codes[:, here] = (rounded - LOW).to(torch.uint8)
            slope += changes @ hessian[here]
        grid = refit_rows(weight, hessian, grid, codes)
    return grid


def refit_rows(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """``grid`` with each row's c at its optimum for the codes, the least-squares scale of the output; g stays."""
    unit = Grid(torch.ones_like(grid.row), grid.group, grid.group_size)
    integers = (codes.to(torch.float32) + LOW) * unit.steps(codes.shape[1])
    projected = integers @ hessian
    best = (projected * weight).sum(1) / (projected * integers).sum(1)
    return Grid(torch.where(best > 0, best, grid.row), grid.group, grid.group_size)  # NaN and 0 keep the old


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper triangular U with ``UᵀU = (H + λI)⁻¹`` in ``order``; channels that are always zero are left uncoupled.

    With J the reversal of order and ``J (H + λI) J = L Lᵀ``, ``U = J L⁻¹ J``: one factorisation and no inverse of H.
    """
    factor = reorder(hessian, order.flip(0))
    damp(factor, damping)
    if not _invert_cholesky_(factor):
        raise CalibrationError(f"the Hessian of {name} is not positive definite with --damping {damping}; give more "
                               "calibration text or raise --damping.")
    return factor.flip(0, 1)


def _invert_cholesky_(matrix: torch.Tensor, block: int = 4096) -> bool:
    """Replace ``matrix`` ``[K, K]`` by the inverse of its lower Cholesky factor; False if it is not positive definite.

    In place and block by block: that of a 70B model takes 3 GiB, and the library's routines for a whole one copy it.
    """
    size = len(matrix)
    blocks = [slice(start, min(start + block, size)) for start in range(0, size, block)]
    for here in blocks:
        matrix[here, here], failed = torch.linalg.cholesky_ex(matrix[here, here])
        if int(failed):
            return False
        corner, rest = matrix[here, here].T, slice(here.stop, size)
        below = torch.linalg.solve_triangular(corner, matrix[rest, here], upper=True, left=False)
        matrix[rest, here] = below
        matrix[rest, rest].addmm_(below, below.T, alpha=-1)
    matrix.tril_()
    for here in blocks:
        unit = torch.eye(here.stop - here.start, dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(matrix[here, here], unit, upper=False)
        done = slice(0, here.start)
        matrix[here, done] = -inverse @ (matrix[here, done] @ matrix[done, done])
        matrix[here, here] = inverse
    return True


def output_errors(
    weights: list[torch.Tensor], hessian: torch.Tensor, cross: torch.Tensor, drift: torch.Tensor | None
) -> list[torch.Tensor]:
    """``E[(W x̃ + (h̃ − h) − W x) xᵀ]`` of each W: what its output lacks against the unquantised model's, seen from the
    quantised model's inputs x. ``cross``, E[x̃ xᵀ], is overwritten."""
    difference = cross.sub_(hessian)
    errors = [weight @ difference for weight in weights]
    if drift is not None:
        errors = [error + part for error, part in zip(errors, drift.split([len(w) for w in weights]), strict=True)]
    return errors


def corrected_targets(
    weights: list[torch.Tensor], errors: list[torch.Tensor], compensation: Compensation
) -> list[torch.Tensor]:
    """Float weights whose output, from the quantised model's inputs x, is nearer that of the unquantised model.

    They go the share CORRECTION of the way from W to the least squares of ``‖W x̃ + (h̃ − h) − W* x‖²``, which is
    W + errors ``(H + λI)⁻¹`` with :func:`output_errors`. Rounding them instead of W undoes part of the error of all
    earlier layers (asymmetric calibration, GPTAQ, Li et al. 2025, here as one exact solve; the residual term extends it
    to what the layer's output is added to).
    """
    return [weight + CORRECTION * compensation.solve(error) for weight, error in zip(weights, errors, strict=True)]


def damp(hessian: torch.Tensor, damping: float) -> None:
    """Raise the diagonal by the share ``damping`` of its mean; channels that are always zero get the mean itself."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal.add_(torch.where(diagonal > 0, damping * mean, mean))


def hessian_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H Dᵀ)``: mean squared error of the layer's output, summed over its outputs."""
    return float((difference @ hessian).mul_(difference).sum())
