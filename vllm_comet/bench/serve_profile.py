# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decoding step goes: the GPU's kernels, as a profiler recorded them, shared out among a few parts.

Pure functions; the recording is done inside vLLM's worker (:mod:`vllm_comet.bench.serve_engine`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

PARTS = {
    "w4ax": r"_w4ax",
    "attention": r"^_(plan|decode|merge|store|gather|prefill)\w*_kernel|flash|reshape_and_cache|unified_attention",
    "norms": r"^_(rms_norm|silu_mul|quantize)_kernel|^triton_|norm|silu|act_and_mul|rotary|quant",
    "products": r"gemm|gemv|nvjet|cutlass|cublas|machete|marlin|splitk",
}
"""Parts of a step by what the names of their kernels contain, the first that matches: COMET's products; attention with
the writing of the cache; norms, activation functions and quantisation; other matrix products, which beside COMET are
the head's. What matches none is the ``rest``: sampling, preparation of inputs, copies."""

GAP_US = 20.0
"""Longer times without a kernel count as waiting: kernels of one CUDA graph follow each other closer."""


class Kernel(NamedTuple):
    """A kernel, copy or fill on the GPU; times in microseconds."""

    name: str
    start: float
    end: float


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), "rest")


def summarize(kernels: list[Kernel], steps: int) -> dict[str, Any]:
    """Microseconds a step: ``step_us``, its parts, ``gaps`` of up to GAP_US between kernels, and ``waiting``, longer
    times in which no kernel ran, mostly for the host; and kernels a step.

    Where two kernels overlap, as with programmatic dependent launch, the time counts for the one that began first: the
    other mostly waits for it.
    """
    if not kernels or not steps:
        raise ValueError(f"{len(kernels)} kernels in {steps} steps: nothing to share out")
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    parts = dict.fromkeys((*PARTS, "rest", "gaps", "waiting"), 0.0)
    reached = kernels[0].start
    for kernel in kernels:
        gap = max(0.0, kernel.start - reached)
        parts["gaps" if gap <= GAP_US else "waiting"] += gap
        parts[part_of(kernel.name)] += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    step = (reached - kernels[0].start) / steps
    return {"steps": steps, "step_us": round(step, 1), "kernels": round(len(kernels) / steps, 1),
            "parts_us": {part: round(us / steps, 1) for part, us in parts.items()}}


def longest(kernels: list[Kernel], steps: int, count: int = 12) -> list[dict[str, Any]]:
    """The kernels that take most, by name: microseconds and launches a step."""
    time: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for kernel in kernels:
        time[kernel.name] += kernel.end - kernel.start
        launches[kernel.name] += 1
    most = sorted(time, key=lambda name: -time[name])[:count]
    return [{"name": name[:120], "us": round(time[name] / steps, 1), "launches": round(launches[name] / steps, 2)}
            for name in most]
