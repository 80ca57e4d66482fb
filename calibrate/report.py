# SPDX-License-Identifier: Apache-2.0
"""The text a finished run prints."""

from __future__ import annotations

from pathlib import Path

from calibrate.models import LINEAR_INPUTS
from calibrate.pipeline import Result


def summary(result: Result, out: Path, seconds: float) -> str:
    """Error of every layer, size, INT8 share, and the command that serves the checkpoint."""
    lines = ["relative squared output error: of the weights | of activations in int8 mode, in mixed mode (INT8 blocks)",
             "layer  " + "".join(f"{i.name:<34}" for i in LINEAR_INPUTS)]
    for index, report in enumerate(result.layers):
        cells = [_cell(report[i.name]) for i in LINEAR_INPUTS]
        lines.append(f"{index:5d}  " + "".join(f"{cell:<34}" for cell in cells).rstrip())
    ratio = result.base_bytes / result.num_bytes
    lines += [
        f"size          {result.num_bytes / 2**20:.1f} MiB; bf16 {result.base_bytes / 2**20:.1f} MiB ({ratio:.2f}x)",
        f"INT8 share    {result.int8_share:.1%} of all input channels",
        f"time          {seconds:.0f} s",
        f"serve it with: vllm serve {out}",
    ]
    return "\n".join(lines)


def _cell(report: dict) -> str:
    weights, count = max(report["weight_error"].values()), report["int8_blocks_per_slice"]
    activations = f"{report['int8_error'][count]:.1e}, {report['mixed_error'][count]:.1e} ({report['int8_blocks']})"
    return f"{weights:.1e} | {activations}"
