# SPDX-License-Identifier: Apache-2.0
"""Which tile a GEMM launch uses: tables measured offline by ``comet-bench tune``, one JSON file per GPU in ``tiles/``.

A file holds ``{"gpu", "layout", "entries": [{"n", "k", "m", "group_size", "tile": {...}}]}``. The entry for a launch
is, of those with the smallest ``m`` that covers M, that of the nearest shape (in the logarithms of N and K). An entry
with a ``group_size`` is for weights of that one only, and preferred to one for all (null) even of a nearer shape. For a
shape that was not measured itself, the K split is derived from the number of tiles instead of taken over.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)
TABLES = Path(__file__).with_name("tiles")
DEFAULT_TABLES = {"hopper": "nvidia-h200", "triton": "triton-default"}
"""Table of a GPU that has none of its own, by weight layout."""


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one GEMM tile.

    block_m tokens × block_n weight rows, K cut in ``split`` slices (0: as many as fill the multiprocessors), ``warps``,
    ``stages`` of prefetched K blocks, ``group_n`` weight tiles that run side by side over the same tokens. On
    Hopper, a stage has ``depth`` K blocks; the weights of a whole stage wait in registers, or of ``ahead`` blocks; a
    thread has at most ``registers`` of them (0: no limit), which lets more programs share a multiprocessor. ``form``
    picks the kernel: ``general``, or ``small`` for few tokens, which shares K out among a program's warps and knows
    neither ``split`` nor ``depth`` nor ``ahead``.
    """

    block_m: int
    block_n: int
    split: int
    warps: int
    stages: int
    group_n: int = 8
    depth: int = 1
    registers: int = 0
    form: str = "general"
    ahead: int = 0

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    n: int
    k: int
    m: int
    tile: Tile
    group_size: int | None = None

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What there can be one entry for in a table, and in which order."""
        return self.n, self.k, self.m, self.group_size or 0


def table_name(device_name: str) -> str:
    """File stem for a GPU name: ``NVIDIA H100 80GB HBM3`` → ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def load_table(path: Path) -> tuple[Entry, ...]:
    entries = json.loads(path.read_text())["entries"]
    return tuple(Entry(e["n"], e["k"], e["m"], Tile(**e["tile"]), e.get("group_size")) for e in entries)


def existing_entries(path: Path, layout: str) -> dict[tuple[int, int, int, int], Entry]:
    """Entries of the table at ``path`` by their keys; none if there is no such table or it is for another layout."""
    if not path.exists() or json.loads(path.read_text())["layout"] != layout:
        return {}
    return {entry.key: entry for entry in load_table(path)}


def save_table(path: Path, gpu: str, layout: str, entries: Iterable[Entry]) -> None:
    lines = [json.dumps({"n": e.n, "k": e.k, "m": e.m, "group_size": e.group_size, "tile": e.tile.to_dict()})
             for e in sorted(entries, key=lambda e: e.key)]
    head = f'{{"gpu": {json.dumps(gpu)}, "layout": {json.dumps(layout)}, "entries": [\n'
    path.write_text(head + ",\n".join(lines) + "\n]}\n")


@cache
def table_for(device_name: str, layout: str) -> tuple[Entry, ...]:
    """The table of this GPU if its layout is the wanted one, else the layout's default; says once which and why."""
    path = TABLES / f"{table_name(device_name)}.json"
    if path.exists() and json.loads(path.read_text())["layout"] == layout:
        logger.info("GEMM tiles of %s come from %s.", device_name, path.name)
    else:
        path = TABLES / f"{DEFAULT_TABLES[layout]}.json"
        logger.info("No GEMM tiles were tuned for %s (layout %s): using %s. `comet-bench tune` makes a table.",
                    device_name, layout, path.name)
    return load_table(path)


def nearest(entries: tuple[Entry, ...], n: int, k: int, m: int, group_size: int) -> Entry:
    """The entry for a product, as the module's docstring says; beyond the largest ``m`` there is, one of that."""
    usable = [e for e in entries if e.group_size in (None, group_size)]
    covering = min((e.m for e in usable if e.m >= m), default=max(e.m for e in usable))

    def distance(entry: Entry) -> tuple[bool, float]:
        return entry.group_size is None, abs(math.log(entry.n / n)) + abs(math.log(entry.k / k))

    return min((e for e in usable if e.m == covering), key=distance)


def auto_split(tile: Tile, n: int, k: int, m: int, processors: int) -> int:
    """Slices of K that give every multiprocessor two tiles, of at least four K blocks each."""
    tiles = -(-n // tile.block_n) * -(-m // tile.block_m)
    return max(1, min(2 * processors // tiles, -(-k // 128) // 4))


@lru_cache(maxsize=8192)
def choose_tile(device: torch.device, layout: str, n: int, k: int, m: int, group_size: int) -> Tile:
    """Tile for a ``[m, k] × [n, k]ᵀ`` product on ``device`` with weights in groups of ``group_size``; touches the GPU
    for nothing but its cached properties."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, processors = properties.name, properties.multi_processor_count
    else:
        name, processors = device.type, 1
    entry = nearest(table_for(name, layout), n, k, max(m, 1), group_size)
    tile = entry.tile
    if tile.form == "general" and (tile.split == 0 or (entry.n, entry.k) != (n, k)):
        tile = replace(tile, split=auto_split(tile, n, k, max(m, 1), processors))
    return tile
