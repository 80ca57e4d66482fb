# SPDX-License-Identifier: Apache-2.0
"""Rounding with error compensation (GPTQ, Frantar et al. 2022) on a fixed two-level grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibrate.errors import CalibrationError
from calibrate.grid import HIGH, LOW, Grid

_COLUMNS = 128
"""Columns between two updates of the rest of the matrix; does not change the result beyond rounding."""


@dataclass(frozen=True)
class Compensation:
    """How the rounding error of one input channel is best spread over others, from the Hessian of a layer's input.

    order ``[K]``: channels from the largest Hessian diagonal down, the order of rounding. inverse float32 ``[K, K]``:
    upper triangular U with ``UᵀU`` the inverse of the damped Hessian in that order.
    """

    order: torch.Tensor
    inverse: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float, name: str) -> Compensation:
        """hessian: float32 ``[K, K]`` in stored order. Raises CalibrationError, naming ``name``, if it is singular."""
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        return cls(order, _inverse_factor(hessian, order, damping, name))

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
    weight = weight[:, order].clone()
    steps = grid.steps(weight.shape[1])[:, order].contiguous()
    codes = torch.empty_like(weight)
    for start in range(0, weight.shape[1], _COLUMNS):
        end = min(start + _COLUMNS, weight.shape[1])
        errors = _round_columns(weight[:, start:end], steps[:, start:end], inverse[start:end, start:end],
                                codes[:, start:end])
        weight[:, end:] -= errors @ inverse[start:end, end:]
    result = torch.empty_like(codes, dtype=torch.uint8)
    result[:, order] = (codes - LOW).to(torch.uint8)
    return result


def refit_rows(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor) -> Grid:
    """``grid`` with each row's c at its optimum for the codes, the least-squares scale of the output; g stays."""
    unit = Grid(torch.ones_like(grid.row), grid.group, grid.group_size)
    integers = (codes.to(torch.float32) + LOW) * unit.steps(codes.shape[1])
    projected = integers @ hessian
    best = (projected * weight).sum(1) / (projected * integers).sum(1)
    return Grid(torch.where(best > 0, best, grid.row), grid.group, grid.group_size)  # NaN and 0 keep the old


def _round_columns(
    weight: torch.Tensor, steps: torch.Tensor, inverse: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Round a block of columns in place into ``codes`` (−8..7); returns its scaled errors ``[N, columns]``."""
    weight = weight.T.contiguous()  # a column is contiguous
    steps, errors = steps.T.contiguous(), torch.empty_like(weight)
    for i in range(weight.shape[0]):
        code = (weight[i] / steps[i]).round_().clamp_(LOW, HIGH)
        codes[:, i] = code
        errors[i] = (weight[i] - code * steps[i]) / inverse[i, i]
        weight[i + 1 :].addr_(inverse[i, i + 1 :], errors[i], alpha=-1)
    return errors.T


def _inverse_factor(hessian: torch.Tensor, order: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper triangular U with ``UᵀU = (H + λI)⁻¹`` in ``order``; channels that are always zero are left uncoupled.

    With J the reversal of order and ``J (H + λI) J = L Lᵀ``, ``U = J L⁻¹ J``: one factorisation and no inverse of H.
    """
    reverse = order.flip(0)
    factor = hessian[reverse.unsqueeze(1), reverse]
    _damp(factor, damping)
    factor, info = torch.linalg.cholesky_ex(factor)
    if int(info):
        raise CalibrationError(f"the Hessian of {name} is not positive definite with --damping {damping}; give more "
                               "calibration text or raise --damping.")
    inverse = torch.eye(len(order), dtype=factor.dtype, device=factor.device)
    torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
    del factor
    return inverse.flip(0, 1)


def corrected_targets(
    weights: list[torch.Tensor], hessian: torch.Tensor, cross: torch.Tensor, drift: torch.Tensor | None,
    compensation: Compensation,
) -> list[torch.Tensor]:
    """The float weights that best give, from the quantised model's inputs x, the output of the unquantised model.

    Least squares of ``‖W x̃ + (h̃ − h) − W* x‖²``: ``W* = W + (W (E[x̃ xᵀ] − H) + E[(h̃ − h) xᵀ]) (H + λI)⁻¹``. Rounding W*
    instead of W undoes part of the error of all earlier layers (asymmetric calibration, GPTAQ, Li et al. 2025, here
    as one exact solve; the residual term extends it to what the layer's output is added to). ``cross`` is overwritten.
    """
    difference = cross.sub_(hessian)
    errors = [weight @ difference for weight in weights]
    if drift is not None:
        errors = [error + part for error, part in zip(errors, drift.split([len(w) for w in weights]), strict=True)]
    return [weight + compensation.solve(error) for weight, error in zip(weights, errors, strict=True)]


def _damp(hessian: torch.Tensor, damping: float) -> None:
    """Raise the diagonal by the share ``damping`` of its mean; channels that are always zero get the mean itself."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(1e-12)
    diagonal.add_(torch.where(diagonal > 0, damping * mean, mean))


def hessian_error(difference: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(D H Dᵀ)``: mean squared error of the layer's output, summed over its outputs."""
    return float((difference @ hessian).mul_(difference).sum())
