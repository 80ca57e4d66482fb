# SPDX-License-Identifier: Apache-2.0
"""``comet-inspect DIR``: what a COMET checkpoint holds, as text with bars or as a page, and whether it is undamaged."""

from __future__ import annotations

import argparse
import html
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.errors import CalibrationError
from calibrate.export import REPORT
from calibrate.loading import ModelSource
from calibrate.models import LINEAR_INPUTS
from vllm_comet import checkpoint as fmt

_BAR = 8
"""Characters of a full bar."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Cell:
    """One activation of a layer: share of its channels that are INT8, and relative squared output errors of its
    linears' weights (the largest) and of its activations in both modes; None where the checkpoint has no report."""

    int8_share: float
    weight_error: float | None = None
    int8_error: float | None = None
    mixed_error: float | None = None


@dataclass(frozen=True)
class Inspection:
    """layers: cells of every layer, in the order of ``LINEAR_INPUTS``. parts: bytes by kind of tensor."""

    name: str
    architecture: str
    comet: fmt.CometFormat
    num_bytes: int
    bf16_bytes: int
    int8_share: float
    parts: dict[str, int]
    layers: list[list[Cell]]
    verified: bool


def inspect_checkpoint(directory: Path, verify: bool = True) -> Inspection:
    """Raises CheckpointError naming the tensor if the checkpoint is damaged or does not follow the format.

    verify: compare the checksum of every tensor, which reads all of it.
    """
    summary = fmt.verify_checkpoint(directory, contents=verify)
    config = json.loads((directory / "config.json").read_text())
    source = ModelSource(directory)
    report = directory / REPORT
    reports = json.loads(report.read_text())["layers"] if report.exists() else None
    layers = []
    for index in range(config["num_hidden_layers"]):
        entries = reports[index] if reports else {}
        layers.append([_cell(source, f"model.layers.{index}.{i.members[0]}", entries.get(i.name))
                       for i in LINEAR_INPUTS])
    return Inspection(directory.name, config["architectures"][0], fmt.CometFormat.from_dict(
        config["quantization_config"]), summary.num_bytes, summary.bf16_bytes, summary.int8_share, _parts(source),
        layers, verify)


def _cell(source: ModelSource, linear: str, entry: dict[str, Any] | None) -> Cell:
    bits = source.tensor(f"{linear}.{fmt.ACT_BITS_NAME}")
    k = 8 * source.shape(f"{linear}.{fmt.WEIGHT_PACKED}")[1]
    share = float((bits.repeat_interleave(fmt.BLOCK)[:k] == 8).float().mean())
    if entry is None:
        return Cell(share)
    count = entry["int8_blocks_per_slice"]
    return Cell(share, max(entry["weight_error"].values()), entry["int8_error"][count], entry["mixed_error"][count])


def _parts(source: ModelSource) -> dict[str, int]:
    parts = {"4-bit weights": 0, "their scales": 0, "channel orders": 0, "embedding and head": 0, "others": 0}
    for name in source.names:
        suffix = name.rpartition(".")[2]
        if suffix == fmt.WEIGHT_PACKED:
            kind = "4-bit weights"
        elif suffix in (fmt.WEIGHT_SCALE, fmt.WEIGHT_GROUP_SCALE):
            kind = "their scales"
        elif suffix in (fmt.INPUT_PERM, fmt.ACT_BITS_NAME):
            kind = "channel orders"
        else:
            kind = "others" if name.startswith("model.layers.") or name == "model.norm.weight" else "embedding and head"
        parts[kind] += source.num_bytes(name)
    return parts


def _facts(found: Inspection) -> list[tuple[str, str]]:
    comet, made = found.comet, dict(found.comet.producer)
    kv = "in the model's dtype" if comet.kv_cache is None else f"4 bits in groups of {comet.kv_cache.group_size}"
    parts = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in found.parts.items())
    settings = ", ".join(f"{key} {value}" for key, value in made.items() if key != "tool")
    return [
        ("checkpoint", f"{found.name}: {found.architecture}, {len(found.layers)} layers, format {comet.version}"),
        ("size", f"{found.num_bytes / 2**20:.1f} MiB; with bf16 weights {found.bf16_bytes / 2**20:.1f} MiB "
                 f"({found.bf16_bytes / found.num_bytes:.2f}x)"),
        ("MiB", parts),
        ("weights", "one scale a row" if comet.group_size == -1 else f"groups of {comet.group_size}"),
        ("KV cache", kv),
        ("parallel", f"tensor-parallel sizes up to {comet.tensor_parallel}"),
        ("INT8 share", f"{found.int8_share:.1%} of all input channels, in mixed mode"),
        ("checksums", "of every tensor are right" if found.verified else "were not compared"),
        ("made by", f"{made.get('tool', 'unknown')}: {settings}" if made else "unknown"),
    ]


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return ("█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")).ljust(_BAR, "·")


def _errors(cell: Cell) -> str:
    if cell.weight_error is None:
        return ""
    return f"{cell.weight_error:.0e} {cell.int8_error:.0e} {cell.mixed_error:.0e}"


def as_text(found: Inspection) -> str:
    """Facts, then a row a layer with a bar for the INT8 share of each activation."""
    lines = [f"{name:<14}{value}" for name, value in _facts(found)]
    reported = any(cell.weight_error is not None for row in found.layers for cell in row)
    lines += ["", "INT8 share of each activation" + (
        "; relative squared output error of weights, INT8 activations, mixed activations" if reported else "")]
    width = _BAR + (24 if reported else 6)
    lines.append("layer  " + "  ".join(f"{i.name:<{width}}" for i in LINEAR_INPUTS).rstrip())
    for index, row in enumerate(found.layers):
        cells = (f"{_bar(cell.int8_share)}{cell.int8_share:4.0%} {_errors(cell)}" for cell in row)
        lines.append(f"{index:5d}  " + "  ".join(f"{cell:<{width}}" for cell in cells).rstrip())
    return "\n".join(lines)


_PAGE = """<!doctype html><meta charset="utf-8"><title>{name}</title>
<style>body{{font:14px system-ui;margin:2em}}td,th{{padding:2px 8px;text-align:left}}
.bar{{display:inline-block;height:10px;background:#c60}}.rest{{display:inline-block;height:10px;background:#ddd}}
small{{color:#666}}</style>
<h1>{name}</h1><table>{facts}</table>
<h2>INT8 share of each activation, and errors</h2>
<p>Relative squared output error of weights, INT8 activations, mixed activations.</p>
<table><tr><th>layer{heads}</tr>{rows}</table>
"""


def as_html(found: Inspection) -> str:
    """The same as one page without scripts or other files."""
    facts = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(value)}</tr>" for name, value in _facts(found))
    rows = []
    for index, row in enumerate(found.layers):
        cells = "".join(
            f'<td><span class="bar" style="width:{100 * c.int8_share:.0f}px"></span><span class="rest" '
            f'style="width:{100 - 100 * c.int8_share:.0f}px"></span> {c.int8_share:.0%} <small>{_errors(c)}</small>'
            for c in row)
        rows.append(f"<tr><th>{index}{cells}</tr>")
    heads = "".join(f"<th>{i.name}" for i in LINEAR_INPUTS)
    return _PAGE.format(name=html.escape(found.name), facts=facts, heads=heads, rows="".join(rows))


def main(argv: list[str] | None = None) -> int:
    """Entry point; 1 with one line on stderr for a damaged checkpoint or none."""
    parser = argparse.ArgumentParser("comet-inspect", description="Show and check a COMET checkpoint.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    parser.add_argument("--no-verify", action="store_true", help="do not compare checksums")
    args = parser.parse_args(argv)
    try:
        found = inspect_checkpoint(args.directory, not args.no_verify)
        if args.html:
            args.html.write_text(as_html(found), encoding="utf-8")
    except (CalibrationError, fmt.CheckpointError, OSError) as error:
        print(f"comet-inspect: error: {error}", file=sys.stderr)
        return 1
    print(as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
