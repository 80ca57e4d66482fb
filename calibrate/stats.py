# SPDX-License-Identifier: Apache-2.0
"""What the calibrator remembers of a linear layer's input: Hessian, channel magnitudes and a sample of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from calibrate.errors import CalibrationError


@contextlib.contextmanager
def products_of_bf16() -> Iterator[None]:
    """Let float32 matrix products round their factors to bf16 or TF32: exact for factors that are bf16 values."""
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend, precision in zip(backends, ("bf16", "tf32"), strict=True):
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def reorder(matrix: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows and columns of ``matrix`` ``[K, K]`` in ``order``. A GPU would make one index for both two int64 ``[K, K]``.
    """
    return matrix.index_select(0, order).index_select(1, order)


class InputStats:
    """Running statistics of one activation ``[..., K]``; all are float32.

    hessian ``[K, K]``: mean of ``x xᵀ``. cross ``[K, K]``: mean of ``x̃ xᵀ`` with x̃ the same activation of the
    unquantised model. drift ``[N, K]`` or None: mean of ``(h̃ − h) xᵀ`` with h the residual stream that the layer's
    output is added to. peak ``[K]``: largest ``|x|``. rows ``[R, K]``: about ``max_rows`` tokens, spread evenly over
    everything seen. A ``[K, K]`` of a 70B model takes 3 GiB, so the first three are handed out once, not copied.
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
        """Count ``x``, the unquantised model's ``reference`` for it, and the residual stream's error ``drift``."""
        exact = contextlib.nullcontext() if x.dtype == torch.float32 else products_of_bf16()
        x = x.flatten(0, -2).to(torch.float32)
        with exact:
            self._sum.addmm_(x.T, x)
            self._cross.addmm_(reference.flatten(0, -2).to(torch.float32).T, x)
        if drift is not None:
            product = drift.flatten(0, -2).T @ x
            self._drift = product if self._drift is None else self._drift.add_(product)
        self.peak = torch.maximum(self.peak, x.abs().amax(0))
        self._rows.append(x[-self.tokens % self._stride :: self._stride].clone())
        self.tokens += x.shape[0]

    def take(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """hessian, cross and drift with their channels in ``order``; may be called once.

        Raises CalibrationError naming the layer if an input was not finite.
        """
        if not bool(torch.isfinite(self._sum.diagonal()).all()):
            raise CalibrationError(f"the input of {self.name} is NaN or infinite on the calibration text; check the "
                                   "model's weights.")
        self._sum = reorder(self._sum, order).div_(self.tokens)
        self._cross = reorder(self._cross, order).div_(self.tokens)
        drift = None if self._drift is None else self._drift[:, order].div_(self.tokens)
        taken = self._sum, self._cross, drift
        del self._sum, self._cross, self._drift
        return taken

    @property
    def rows(self) -> torch.Tensor:
        return torch.cat(self._rows)
