# SPDX-License-Identifier: Apache-2.0
"""What ``comet-bench serve`` adds inside vLLM's worker processes: a loader that fills dummy weights fairly and notes
what loading cost, and a method to read that.

Random weights must be random *bits*: tensor cores draw less power, and so clock higher, on operands that are zero or
constant. vLLM's dummy loader leaves packed int32 weights as the allocator found them, mostly zero;
:class:`RandomLoader` fills them, for every mode alike. 16-bit weights, FP8 weights and scales are vLLM's own uniform
random numbers, and COMET's layers draw valid codes, scales and permutations themselves (``CometLinearMethod``).
Importing this module replaces vLLM's dummy loader in this process; name it as ``worker_extension_cls``.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

PACKED_WEIGHTS = ("weight_packed", "qweight")


class LoadReport:
    """vLLM's worker extension: its method answers ``collective_rpc``."""

    comet_bench_load: ClassVar[dict[str, float]] = {}

    def comet_bench_report(self) -> dict[str, float]:
        """``load_s``; bytes of GPU memory: ``weights_bytes``, ``peak_load_bytes``, ``reserved_bytes`` in all by now."""
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return {**LoadReport.comet_bench_load, "reserved_bytes": reserved}


@register_model_loader("dummy")
class RandomLoader(DummyModelLoader):
    """vLLM's dummy loader, and random bits in packed integer weights."""

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        started = time.perf_counter()
        model = super().load_model(*args, **kwargs)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        LoadReport.comet_bench_load.update(
            load_s=round(time.perf_counter() - started, 2),
            weights_bytes=torch.cuda.memory_allocated() if on_gpu else 0,
            peak_load_bytes=torch.cuda.max_memory_allocated() if on_gpu else 0,
        )
        return model

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        super().load_weights(model, model_config)
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 1)[-1] in PACKED_WEIGHTS and parameter.dtype == torch.int32:
                parameter.data.random_(-(2**31), 2**31 - 1)
