# SPDX-License-Identifier: Apache-2.0
"""What a calibration would do and take, worked out from the model's config and file headers: ``--dry-run``."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from calibrate.gptq import SWEEPS
from calibrate.hidden import default_device_budget, default_host_budget
from calibrate.loading import ModelSource
from calibrate.models import DOWN, LINEAR_INPUTS, Dims, Family, tensor_parallel_obstacle
from calibrate.rows import ROUNDED_BYTES
from calibrate.stats import products_of_bf16
from vllm_comet import checkpoint as fmt
from vllm_comet.kernels.kv4_cache import bytes_per_token

_GIB = 2**30
_COLUMN_SECONDS = {"cpu": 40e-6, "cuda": 1e-6}
"""Of rounding one channel once, beside the products."""
_ALLOCATOR = 1.65
"""What PyTorch took for a layer of Llama-3-8B on an H200, over what is counted here."""
_MOVES, _BUS_BYTES = 4.5, 8e9
"""How often a layer moves its hidden states between host and GPU, and bytes a second of pageable memory."""


@dataclass(frozen=True)
class Limits:
    """Bytes that a run may take; None: what the machine suggests. They change nothing in the result.

    gpu_memory: of each GPU's memory (a layer that needs more takes it). host_memory: of hidden states in host memory;
    what is left over goes to files.
    """

    gpu_memory: int | None = None
    host_memory: int | None = None


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, time in seconds. base: all tensors in bf16. tokens: of the calibration text. devices: the first
    computes, and all of them round."""

    dims: Dims
    family: Family
    comet: fmt.CometFormat
    base: int
    tokens: int
    devices: tuple[torch.device, ...]
    gpu_memory: int
    host_memory: int

    @classmethod
    def of(cls, source: ModelSource, dims: Dims, family: Family, comet: fmt.CometFormat, tokens: int,
           devices: tuple[torch.device, ...], limits: Limits) -> Plan:
        """Reads the headers of the model's files, not the weights."""
        gpu = min(map(default_device_budget, devices)) if limits.gpu_memory is None else limits.gpu_memory
        host = default_host_budget() if limits.host_memory is None else limits.host_memory
        return cls(dims, family, comet, source.bf16_bytes(), tokens, devices, gpu, host)

    @property
    def device(self) -> torch.device:
        """Where the layers are computed."""
        return self.devices[0]

    @property
    def checkpoint(self) -> int:
        """All tensors of the checkpoint."""
        offset = self.comet.kv_cache is not None and self.comet.kv_cache.k_offset
        layer = self.dims.kv_heads * self.dims.head_dim * 4 if offset else 0  # float32
        for linear_input in LINEAR_INPUTS:
            for rows in self.dims.rows(linear_input):
                spec = fmt.linear_tensors(rows, self.dims.width(linear_input), self.comet.group_size)
                if linear_input is DOWN:
                    del spec[fmt.INPUT_PERM]  # folded into gate and up
                layer += sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())
        return self.base + self.dims.layers * (layer - 2 * self.layer_weights)

    @property
    def room(self) -> dict[torch.device, int]:
        """Bytes for hidden states on each device, the host last: beside what a layer needs there."""
        if self.device.type == "cpu":
            return {self.device: self.host_memory}
        needed = [self.layer_bytes] + [self.rounding_bytes] * (len(self.devices) - 1)
        left = {device: max(0, self.gpu_memory - n) for device, n in zip(self.devices, needed, strict=True)}
        return left | {torch.device("cpu"): self.host_memory}

    @property
    def hidden_on_gpu(self) -> int:
        """Hidden states that stay on GPUs."""
        return min(self.hidden_bytes, sum(b for device, b in self.room.items() if device.type != "cpu"))

    @property
    def spilled(self) -> int:
        """Hidden states that go to files."""
        return max(0, self.hidden_bytes - self.hidden_on_gpu - self.host_memory)

    @property
    def disk(self) -> int:
        """Most that is on disk at a time: finished layers, the checkpoint made from them, hidden states."""
        return 2 * self.checkpoint + self.spilled

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """Of a token in all layers: in the 4-bit cache (or bf16 if there is none) and in bf16."""
        plain = self.dims.layers * self.dims.kv_heads * self.dims.head_dim * 4
        if self.comet.kv_cache is None:
            return plain, plain
        size = bytes_per_token(self.dims.head_dim, self.comet.kv_cache.group_size)
        return self.dims.layers * self.dims.kv_heads * size, plain

    @property
    def layer_weights(self) -> int:
        """Weights of a layer's linears."""
        return sum(self.dims.width(i) * sum(self.dims.rows(i)) for i in LINEAR_INPUTS)

    @property
    def hidden_bytes(self) -> int:
        """Hidden states of both models, before and inside a layer."""
        return 4 * self.tokens * self.dims.hidden * (4 if self.device.type == "cpu" else 2)

    @property
    def layer_bytes(self) -> int:
        """Peak of what a layer needs where it is computed: both models' weights and the K x K matrices of its widest
        input, four at a time, with three copies of the weight that reads it and the activations of one chunk."""
        k = max(self.dims.width(i) for i in LINEAR_INPUTS)
        counted = 6 * self.layer_weights + 4 * (4 * k * k + 3 * k * self.dims.hidden) + 8192 * k * 4
        return int(_ALLOCATOR * counted)

    @property
    def rounding_bytes(self) -> int:
        """Peak of what rounding takes on a GPU other than the first: two K x K matrices and the rows in work."""
        k = max(self.dims.width(i) for i in LINEAR_INPUTS)
        return int(_ALLOCATOR * (8 * k * k + 10 * ROUNDED_BYTES))

    def layer_seconds(self, rates: Rates) -> float:
        """Statistics and three passes of the layer; factorisation and rounding; hidden states on their way."""
        widths = [self.dims.width(i) for i in LINEAR_INPUTS]
        low = self.tokens * (4 * sum(k * k for k in widths) + 6 * self.layer_weights)
        exact: float = self.tokens * 2 * self.dims.hidden * (widths[1] + widths[3])
        exact += sum(2 * k**3 + (10 + 6 * SWEEPS) * k * k * sum(self.dims.rows(i)) / len(self.devices)
                     for i, k in zip(LINEAR_INPUTS, widths, strict=True))
        columns = (1 + SWEEPS) * sum(len(i.members) * k for i, k in zip(LINEAR_INPUTS, widths, strict=True))
        moved = 0 if self.device.type == "cpu" else (self.hidden_bytes - self.hidden_on_gpu) * _MOVES
        return low / rates.low + exact / rates.exact + columns * _COLUMN_SECONDS[self.device.type] + moved / _BUS_BYTES


@dataclass(frozen=True)
class Rates:
    """Operations a second of matrix products: of bf16 values, and in float32."""

    low: float
    exact: float

    @classmethod
    def of(cls, device: torch.device) -> Rates:
        """Measured on one product of each kind, best of three."""
        size = 2048 if device.type == "cpu" else 8192
        x = torch.randn(size, size, device=device).to(torch.bfloat16).to(torch.float32)
        with products_of_bf16():
            low = _product_seconds(x)
        return cls(2 * size**3 / low, 2 * size**3 / _product_seconds(x))


def _product_seconds(x: torch.Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float((x @ x)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times)


def describe(plan: Plan, rates: Rates) -> str:
    """The plan as text; ``rates``: of the plan's device."""
    dims, comet = plan.dims, plan.comet
    kv, kv_plain = plan.kv_bytes
    host = plan.hidden_bytes - plan.hidden_on_gpu - plan.spilled + 2 * plan.layer_weights
    gpu = plan.layer_bytes + min(plan.hidden_bytes, plan.room[plan.device])
    on_gpu = plan.device.type != "cpu"
    seconds = plan.layer_seconds(rates) * dims.layers
    lines = [
        f"model         {plan.family.name}: {dims.layers} layers, {dims.heads} query and {dims.kv_heads} KV heads of "
        f"{dims.head_dim}",
        "quantised     in every layer, [outputs, inputs]:",
    ]
    for i in LINEAR_INPUTS:
        shapes = ", ".join(f"{member.split('.')[1]} [{rows}, {dims.width(i)}]"
                           for member, rows in zip(i.members, dims.rows(i), strict=True))
        lines.append(f"              {shapes}: {fmt.num_blocks(dims.width(i))} activation blocks")
    lines += [
        f"parallel      tensor-parallel sizes up to {comet.tensor_parallel}{_why_not_more(dims, comet)}",
        f"checkpoint    {plan.checkpoint / 2**20:.1f} MiB; bf16 {plan.base / 2**20:.1f} MiB "
        f"({plan.base / plan.checkpoint:.2f}x)",
        f"KV cache      {kv} bytes a token; bf16 {kv_plain} ({kv_plain / kv:.2f}x)",
        f"text          {plan.tokens} tokens",
        f"memory        about {(host + (0 if on_gpu else plan.layer_bytes)) / _GIB:.1f} GiB of host memory beside the "
        f"libraries' own" + (f", {gpu / _GIB:.1f} GiB on the GPU" if on_gpu else "") + _other_gpus(plan),
        f"disk          {plan.disk / _GIB:.1f} GiB while it runs"
        + (f", {plan.spilled / _GIB:.1f} GiB of it for hidden states beyond --host-memory" if plan.spilled else ""),
        f"time          {_duration(seconds)}, a rough estimate: operations at the rate of one matrix product here "
        f"({rates.low / 1e12:.2g} TFLOP/s); the real time can be half or three times that",
    ]
    return "\n".join(lines)


def _other_gpus(plan: Plan) -> str:
    others = sum(b for device, b in plan.room.items() if device.type != "cpu" and device != plan.device)
    if len(plan.devices) == 1:
        return ""
    hidden = min(others, max(0, plan.hidden_bytes - plan.room[plan.device]))
    each = plan.rounding_bytes + hidden / (len(plan.devices) - 1)
    return f" and {each / _GIB:.1f} GiB on each of {len(plan.devices) - 1} more, which round with it"


def _why_not_more(dims: Dims, comet: fmt.CometFormat) -> str:
    if comet.tensor_parallel >= 8:
        return ""
    obstacle = tensor_parallel_obstacle(dims, 2 * comet.tensor_parallel)
    return f" ({2 * comet.tensor_parallel} can't be: {obstacle})" if obstacle else ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
