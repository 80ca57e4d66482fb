# SPDX-License-Identifier: Apache-2.0
"""Dynamic per-token activation quantisation in two segments.

A row of x, gathered into stored order, is cut at ``split``: positions below it are the INT4 segment, the others the
INT8 segment. Each segment of each row has its own symmetric scale. With ``low_bits`` 8 the low segment runs in INT8.
"""

from __future__ import annotations

import torch

QMAX = {4: 7, 8: 127}
"""Largest code of a symmetric segment of 4 or 8 bits (−8 and −128 are not used)."""
TINY = 1e-20


def quantize_activation_ref(
    x: torch.Tensor, perm: torch.Tensor | None, split: int, low_bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise ``x`` ``[M, K]`` (fp32, bf16 or fp16) to int8 codes ``[M, K]`` and float32 scales ``[M, 2]``.

    perm: int32/int64 ``[K]`` or None; position j of the result holds channel ``perm[j]``.
    split: end of the low segment, 0..K. low_bits: 4 or 8, the precision of the low segment; the other has 8.

    Per row and segment, in float32: ``a = max|x|``, ``code = rint(x · (qmax / max(a, 1e-20)))`` (ties to even),
    ``scale = a · float32(1 / qmax)``. An empty segment has scale 0.
    """
    x = x.to(torch.float32)
    if perm is not None:
        x = x.index_select(1, perm.to(torch.int64))
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.zeros(x.shape[0], 2, dtype=torch.float32, device=x.device)
    for segment, (start, end, bits) in enumerate(((0, split, low_bits), (split, x.shape[1], 8))):
        if start == end:
            continue
        part, qmax = x[:, start:end], QMAX[bits]
        amax = part.abs().amax(dim=1, keepdim=True)
        codes[:, start:end] = torch.round(part * (qmax / amax.clamp_min(TINY))).to(torch.int8)
        scales[:, segment] = amax[:, 0] * (1.0 / qmax)
    return codes, scales
