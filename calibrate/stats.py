# SPDX-License-Identifier: Apache-2.0
"""What the calibrator remembers of a linear layer's input: Hessian, channel magnitudes and a sample of tokens."""

from __future__ import annotations

import torch

from calibrate.errors import CalibrationError


class InputStats:
    """Running statistics of one activation ``[..., K]``.

    hessian: float32 ``[K, K]``, mean of ``x xᵀ``. cross: float32 ``[K, K]``, mean of ``x̃ xᵀ`` with x̃ the same activation of
    the unquantised model. drift: float32 ``[N, K]`` or None, mean of ``(h̃ − h) xᵀ`` with h the residual stream that the
    layer's output is added to. peak: float32 ``[K]``, largest ``|x|``. rows: up to ``max_rows`` tokens
    ``[R, K]``, spread evenly over everything seen.
    """

    def __init__(self, name: str, k: int, device: torch.device, max_rows: int, expected_tokens: int):
        self.name, self.tokens = name, 0
        self._sum = torch.zeros(k, k, device=device)
        self._cross = torch.zeros(k, k, device=device)
        self._drift: torch.Tensor | None = None
        self.peak = torch.zeros(k, device=device)
        self._stride = max(1, expected_tokens // max_rows)
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, reference: torch.Tensor, drift: torch.Tensor | None = None) -> None:
        """Count ``x``, the unquantised model's ``reference`` of equal shape, and the residual stream's error ``drift``."""
        x = x.flatten(0, -2).to(torch.float32)
        self._sum.addmm_(x.T, x)
        self._cross.addmm_(reference.flatten(0, -2).T, x)
        if drift is not None:
            product = drift.flatten(0, -2).T @ x
            self._drift = product if self._drift is None else self._drift.add_(product)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self._rows.append(x[-self.tokens % self._stride :: self._stride].clone())
        self.tokens += x.shape[0]

    @property
    def hessian(self) -> torch.Tensor:
        """Raises CalibrationError naming the layer if an input was not finite."""
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise CalibrationError(f"the input of {self.name} is NaN or infinite on the calibration text; check the "
                                   "model's weights.")
        return self._sum / self.tokens

    @property
    def cross(self) -> torch.Tensor:
        return self._cross / self.tokens

    @property
    def drift(self) -> torch.Tensor | None:
        return None if self._drift is None else self._drift / self.tokens

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self._rows)
