# SPDX-License-Identifier: Apache-2.0
"""Quantises weights row by row: once the input's Hessian is known no row depends on another, so they are rounded a part
at a time, on every GPU there is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from calibrate.gptq import SWEEPS, Compensation, descend, gptq, refit_rows
from calibrate.grid import Grid, QuantizedLinear, search_grid

ROUNDED_BYTES = 1 << 28
"""Of a float32 weight that a device rounds at once, as that takes ten times as much."""


class RowQuantizer:
    """Quantises the weights that read one input.

    hessian float32 ``[K, K]``, damped, and compensation: of that input. devices: each gets a copy of both and an equal
    share of every weight's rows. What a row becomes does not depend on how many there are, but for the order of sums.
    """

    def __init__(
        self, hessian: torch.Tensor, compensation: Compensation, group_size: int, devices: tuple[torch.device, ...]
    ):
        self.group_size = group_size
        self.places = [(hessian.to(device), compensation.to(device)) for device in devices]

    def quantize(self, weight: torch.Tensor) -> QuantizedLinear:
        """``weight`` float32 ``[N, K]`` on a grid of its own."""
        places = len(self.places)
        rows = min(-(-len(weight) // places), ROUNDED_BYTES // (4 * weight.shape[1]))
        parts = weight.split(max(1, rows))

        def share(place: int) -> list[tuple[Grid, torch.Tensor]]:
            return [self._round(part, *self.places[place]) for part in parts[place::places]]

        with ThreadPoolExecutor(places) as pool:
            shares = list(pool.map(share, range(places)))
        grids, codes = zip(*(shares[i % places][i // places] for i in range(len(parts))), strict=True)
        return QuantizedLinear(Grid.cat(list(grids)), torch.cat(codes))

    @torch.no_grad()  # a thread does not inherit it
    def _round(
        self, rows: torch.Tensor, hessian: torch.Tensor, compensation: Compensation
    ) -> tuple[Grid, torch.Tensor]:
        home, rows = rows.device, rows.to(hessian.device)
        with torch.cuda.device_of(rows):  # where Triton launches
            grid = search_grid(rows, compensation.importance, self.group_size)
            codes = gptq(rows, compensation, grid)
            grid = refit_rows(rows, hessian, grid, codes)
            grid = descend(rows, hessian, grid, codes, SWEEPS)
        return grid.to(home), codes.to(home)
