# SPDX-License-Identifier: Apache-2.0
"""Rounding columns one after the other, each with what rounding those before it did: the inner loop of GPTQ and of
coordinate descent, in torch and as a Triton kernel (a column takes a GPU a dozen launches otherwise)."""

from __future__ import annotations

import torch

from calibrate.grid import HIGH, LOW
from vllm_comet.kernels._triton import HAS_TRITON, tl, triton

COLUMNS = 128
"""Most columns of a call."""
_ROWS = 16
"""Rows of a program of the kernel."""


def round_columns(
    values: torch.Tensor, steps: torch.Tensor, coupling: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes −8..7 and changes, both float32 ``[N, C]``, of ``values`` ``[N, C]`` on a grid of ``steps`` ``[N, C]``.

    Column i becomes ``code · step``; its change is that less ``before`` (None: less its value), and lowers the values
    of the columns after it by the change times row i of ``coupling`` ``[C, C]``.
    """
    values, steps, coupling = values.contiguous(), steps.contiguous(), coupling.contiguous()
    before = None if before is None else before.contiguous()
    if values.device.type == "cuda" and HAS_TRITON:
        return _round_columns_triton(values, steps, coupling, before)
    return _round_columns_torch(values, steps, coupling, before)


def _round_columns_torch(
    values: torch.Tensor, steps: torch.Tensor, coupling: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values, steps = values.T.contiguous(), steps.T.contiguous()  # a column is contiguous
    before = values if before is None else before.T.contiguous()
    codes, changes = torch.empty_like(values), torch.empty_like(values)
    for i in range(len(values)):
        codes[i] = (values[i] / steps[i]).clamp_(LOW, HIGH).round_()
        changes[i] = codes[i] * steps[i] - before[i]
        values[i + 1 :].addr_(coupling[i, i + 1 :], changes[i], alpha=-1)
    return codes.T, changes.T


def _round_columns_triton(
    values: torch.Tensor, steps: torch.Tensor, coupling: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = values.shape
    codes, changes = torch.empty_like(values), torch.empty_like(values)
    _round_columns_kernel[(triton.cdiv(rows, _ROWS),)](
        values, steps, coupling, before, codes, changes, rows, columns, ROWS=_ROWS, COLUMNS=COLUMNS,
        HAS_BEFORE=before is not None)
    return codes, changes


@triton.jit
def _column(tile, here):
    return tl.sum(tl.where(here, tile, 0.0), axis=1)


@triton.jit
def _round_columns_kernel(
    values_ptr, steps_ptr, coupling_ptr, before_ptr, codes_ptr, changes_ptr, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_BEFORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    values = tl.load(values_ptr + at, mask=inside, other=0.0)
    steps = tl.load(steps_ptr + at, mask=inside, other=1.0)
    codes = values
    changes = values
    before = values
    if HAS_BEFORE:
        before = tl.load(before_ptr + at, mask=inside, other=0.0)
    for i in range(columns):
        here = column[None, :] == i
        value, step = _column(values, here), _column(steps, here)
        old = value
        if HAS_BEFORE:
            old = _column(before, here)
        magic: tl.constexpr = 12582912.0  # 1.5 · 2**23: adding it leaves no fraction bits; ties go to even
        code = (tl.minimum(tl.maximum(tl.div_rn(value, step), -8.0), 7.0) + magic) - magic
        change = code * step - old
        after = tl.load(coupling_ptr + i * columns + column, mask=(column > i) & (column < columns), other=0.0)
        values -= change[:, None] * after[None, :]
        codes = tl.where(here, code[:, None], codes)
        changes = tl.where(here, change[:, None], changes)
    tl.store(codes_ptr + at, codes, mask=inside)
    tl.store(changes_ptr + at, changes, mask=inside)
