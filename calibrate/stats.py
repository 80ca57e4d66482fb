# SPDX-License-Identifier: Apache-2.0
"""What the calibrator remembers of a linear layer's input: Hessian, channel magnitudes and a sample of tokens."""

from __future__ import annotations

import torch

from calibrate.errors import CalibrationError


class InputStats:
    """Running statistics of one activation ``[..., K]``.

    hessian: float32 ``[K, K]``, mean of ``x xᵀ``. peak: float32 ``[K]``, largest ``|x|``. rows: up to ``max_rows`` tokens
    ``[R, K]``, spread evenly over everything seen.
    """

    def __init__(self, name: str, k: int, device: torch.device, max_rows: int, expected_tokens: int):
        self.name, self.tokens = name, 0
        self._sum = torch.zeros(k, k, device=device)
        self.peak = torch.zeros(k, device=device)
        self._stride = max(1, expected_tokens // max_rows)
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor) -> None:
        """Raises CalibrationError naming the layer if ``x`` is not finite."""
        x = x.flatten(0, -2).to(torch.float32)
        if not bool(torch.isfinite(x).all()):
            raise CalibrationError(f"the input of {self.name} is NaN or infinite on the calibration text; check the "
                                   "model's weights.")
        self._sum.addmm_(x.T, x)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self._rows.append(x[-self.tokens % self._stride :: self._stride].clone())
        self.tokens += x.shape[0]

    @property
    def hessian(self) -> torch.Tensor:
        return self._sum / self.tokens

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self._rows)
