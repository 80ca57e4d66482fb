# SPDX-License-Identifier: Apache-2.0
"""What ``comet-bench serve`` adds inside vLLM's worker processes: a loader that fills dummy weights fairly and notes
what loading cost, a method to read that, and a profiler.

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

from vllm_comet.bench.serve_profile import Kernel, longest, summarize

PACKED_WEIGHTS = ("weight_packed", "qweight")


class WorkerExtension:
    """vLLM's worker extension: its methods answer ``collective_rpc``."""

    model_runner: Any
    comet_bench_load: ClassVar[dict[str, float]] = {}

    def comet_bench_report(self) -> dict[str, float]:
        """``load_s``; bytes of GPU memory: ``weights_bytes``, ``peak_load_bytes``, ``reserved_bytes`` in all by now."""
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return {**WorkerExtension.comet_bench_load, "reserved_bytes": reserved}

    def comet_bench_profile_start(self) -> None:
        """Record the GPU's kernels, and count the steps, until ``comet_bench_profile_stop``."""
        self._comet_bench_steps = 0
        execute = self.model_runner.execute_model

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._comet_bench_steps += 1
            return execute(*args, **kwargs)

        self.model_runner.execute_model = counted
        torch.cuda.synchronize()
        self._comet_bench_profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._comet_bench_profiler.start()

    def comet_bench_profile_stop(self) -> dict[str, Any]:
        """What ``serve_profile.summarize`` and ``longest`` make of the recording."""
        torch.cuda.synchronize()
        self._comet_bench_profiler.stop()
        del self.model_runner.execute_model  # the class's own shows again
        on_gpu = torch.autograd.DeviceType.CUDA
        kernels = [Kernel(event.name, event.time_range.start, event.time_range.end)
                   for event in self._comet_bench_profiler.events() if event.device_type == on_gpu]
        steps = self._comet_bench_steps
        return summarize(kernels, steps) | {"longest": longest(kernels, steps)}


@register_model_loader("dummy")
class RandomLoader(DummyModelLoader):
    """vLLM's dummy loader, and random bits in packed integer weights."""

    def load_model(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        started = time.perf_counter()
        model = super().load_model(*args, **kwargs)
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        WorkerExtension.comet_bench_load.update(
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
