# SPDX-License-Identifier: Apache-2.0
"""How kernel benchmarks measure: CUDA-graph replays or events, in microseconds, and the record of where they ran."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

REPLAYS = 7
HEAD_START = 3
"""Before timed launches, the GPU spins this many times as long as the host needs to enqueue them."""
SPIN_HZ = 2e9  # cycles of a spin a second, no lower than the GPU's clock
REST_S = 0.03
"""Pause before a measurement of milliseconds: such kernels drive the GPU to its power limit, and without a rest each
would be timed at the clock that the one before it left behind (seen on an H100: 10 % within one run)."""


def _median_event_us(run: Callable[[], None], calls: int, repeats: int, head_start: int = 0) -> float:
    times: list[float] = []
    for _ in range(repeats + 1):
        if times and times[0] * calls > 1000:
            time.sleep(REST_S)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if head_start:
            torch.cuda._sleep(head_start)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    return sorted(times[1:])[repeats // 2]


def graph_us(functions: Sequence[Callable[[], Any]], calls: int = 0, repeats: int = REPLAYS) -> float:
    """Median time of one call when ``functions`` run in turn inside one CUDA graph of at least ``calls`` calls.

    Give each function its own copy of the large operands, together larger than the L2, and no operand is found there.
    """
    calls = max(calls, len(functions))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and warm up outside the capture
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            functions[i % len(functions)]()
    graph.replay()
    torch.cuda.synchronize()
    return _median_event_us(graph.replay, calls, repeats)


def stream_us(function: Callable[[], Any], calls: int = 10, repeats: int = REPLAYS) -> float:
    """Median time of one call when ``calls`` calls wait in the stream back to back, no graph.

    A spin kernel in front gives the host a head start, so the time is the GPU's and not that of Python's launches.
    """

    def run() -> None:
        for _ in range(calls):
            function()

    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    host_s = time.perf_counter() - begin
    torch.cuda.synchronize()
    return _median_event_us(run, calls, repeats, head_start=int(HEAD_START * host_s * SPIN_HZ))


def l2_copies(num_bytes: int, factor: float = 3.0) -> int:
    """Copies of an operand of ``num_bytes`` that together exceed ``factor`` times the L2 of the current GPU."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, int(-(-factor * l2 // max(num_bytes, 1))))


def environment() -> dict[str, Any]:
    """``device``, ``versions``, ``commit`` and ``command`` of this run, for a results file."""
    import importlib.metadata as metadata

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in ("torch", "triton", "vllm", "vllm-comet"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"device": device, "versions": versions, "commit": _commit(),
            "command": " ".join(["comet-bench", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])])}


def _commit() -> str | None:
    """Hash of the checked-out commit, with ``-dirty`` for a changed tree; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        result = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=root, text=True,
                                capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def write_results(path: Path, rows: list[dict[str, Any]], env: dict[str, Any] | None = None) -> None:
    """Write a results file: the environment and one object per measured row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**(env or environment()), "rows": rows}, indent=1) + "\n")
