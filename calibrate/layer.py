# SPDX-License-Identifier: Apache-2.0
"""Quantises one decoder layer: each linear on the inputs that the linears before it, already quantised, produce."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from calibrate.decoder import DecoderBuilder, DecoderLayer
from calibrate.errors import CalibrationError
from calibrate.fmpq import act_bits, error_curve, outlier_last, round_trip_activation
from calibrate.gptq import Compensation, corrected_targets, damp, hessian_error, output_errors
from calibrate.grid import QuantizedLinear
from calibrate.hidden import Streams, release_cached_memory
from calibrate.kv_smooth import smooth_k
from calibrate.models import DOWN, GATE_UP, LINEAR_INPUTS, OUT, QKV, LinearInput
from calibrate.rows import RowQuantizer
from calibrate.stats import InputStats
from vllm_comet.checkpoint import K_OFFSET, CometFormat, num_blocks

_ROWS = 512
"""Tokens on which the activation error of a linear is measured."""
_SAMPLES, _LENGTH = 2, 256
"""Beginnings of samples on which the activation error of a whole layer is measured."""


class LayerCalibrator:
    """Turns float decoder layers into comet tensors, one at a time.

    devices: that round, the builder's, where all else is computed, among them.
    """

    def __init__(
        self, builder: DecoderBuilder, comet: CometFormat, damping: float, devices: tuple[torch.device, ...]
    ):
        self.builder, self.comet, self.damping, self.devices = builder, comet, damping, devices
        self.kv_group_size = comet.kv_cache.group_size if comet.kv_cache else None

    def run(
        self, index: int, tensors: dict[str, torch.Tensor], streams: Streams
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Stored tensors of layer ``index`` (names relative to it, without act_bits) and its report.

        tensors: the layer's weights as loaded. streams: its input in the quantised model, left as it is, and in the
        unquantised model (``exact``), replaced by that layer's output.
        """
        layer, exact = self.builder.build(index, tensors), self.builder.build(index, tensors, self.builder.dtype)
        job = _LayerJob(self, layer, index, streams.tokens)
        s = streams
        if self.kv_group_size is not None:
            job.k_offset, job.report["kv_smoothing"] = smooth_k(
                layer, layer.attention_input(s.hidden[0]), self.kv_group_size)

        def out_inputs() -> Iterator[tuple]:
            for i, (h, e) in enumerate(zip(s.hidden, s.exact, strict=True)):
                s.middle[i], s.exact_middle[i] = x, exact_x = layer.attended(h), exact.attended(e)
                yield x, exact_x, self._drift(h, e)

        def gate_up_inputs() -> Iterator[tuple]:
            for i, (h, e, x, exact_x) in enumerate(zip(s.hidden, s.exact, s.middle, s.exact_middle, strict=True)):
                s.middle[i], s.exact_middle[i] = h, e = layer.add_attention(h, x), exact.add_attention(e, exact_x)
                yield layer.mlp_input(h), exact.mlp_input(e)

        def down_inputs() -> Iterator[tuple]:
            for i, (h, e) in enumerate(zip(s.middle, s.exact_middle, strict=True)):
                exact_x = exact.mlp_hidden(exact.mlp_input(e))
                s.exact[i] = exact.add_mlp(e, exact_x)
                yield layer.mlp_hidden(layer.mlp_input(h)), exact_x, self._drift(h, e)

        job.quantize(QKV, ((layer.attention_input(h), exact.attention_input(e))
                           for h, e in zip(s.hidden, s.exact, strict=True)))
        job.quantize(OUT, out_inputs())
        job.quantize(GATE_UP, gate_up_inputs())
        job.quantize(DOWN, down_inputs())
        job.measure_output_errors(s.hidden[0][:_SAMPLES, :_LENGTH].to(torch.float32))
        return job.stored_tensors(), job.report

    def _drift(self, hidden: torch.Tensor, exact: torch.Tensor) -> torch.Tensor | None:
        """What a linear that adds to the residual stream should make good; a norm in between rules it out."""
        return None if self.builder.family.sandwich_norm else exact.to(torch.float32) - hidden


class _LayerJob:
    """The state of one layer while its linears are quantised in turn."""

    def __init__(self, owner: LayerCalibrator, layer: DecoderLayer, index: int, tokens: int):
        self.owner, self.layer, self.index, self.tokens = owner, layer, index, tokens
        self.done: dict[str, QuantizedLinear] = {}
        self.report: dict[str, Any] = {}
        self.k_offset: torch.Tensor | None = None

    def quantize(self, linear_input: LinearInput, inputs: Iterable[tuple]) -> None:
        """Quantise the members of ``linear_input`` from their common ``inputs`` and put the result in the layer."""
        k = self.layer.dims.width(linear_input)
        name = f"model.layers.{self.index}.{linear_input.members[0]}"
        stats = InputStats(name, k, self.owner.builder.device, _ROWS, self.tokens)
        for x in inputs:
            stats.add(*x)
        del x  # a chunk is large
        release_cached_memory(self.owner.builder.device)  # of activations: what comes has other sizes
        slices = self._slices(linear_input)
        perm = outlier_last(stats.peak, slices)
        hessian, cross, drift = stats.take(perm)
        errors, weights = {}, []
        floats = [self.layer.linear(member).weight[:, perm] for member in linear_input.members]
        missing = output_errors(floats, hessian, cross, drift)
        del cross, drift  # before the factorisation, which takes most
        compensation = Compensation.of(hessian, self.owner.damping, name)
        targets = corrected_targets(floats, missing, compensation)
        del floats, missing
        damp(hessian, self.owner.damping)
        quantizer = RowQuantizer(hessian, compensation, self.owner.comet.group_size, self.owner.devices)
        for member, weight in zip(linear_input.members, targets, strict=True):
            power = hessian_error(weight, hessian)
            if not math.isfinite(power):
                raise CalibrationError(f"the weights of model.layers.{self.index}.{member} are too large: what they "
                                       "give exceeds float32 on the calibration text; check the model's weights.")
            quantized = quantizer.quantize(weight)
            quantized.perm = perm
            self.done[member] = quantized
            stored = quantized.dequantize()
            errors[member] = hessian_error(stored - weight, hessian) / max(power, 1e-30)
            self.layer.linear(member).weight[:, perm] = stored
            weights.append(stored)
        del quantizer, compensation, hessian, targets
        rows, readers = stats.rows[:, perm], torch.cat(weights)
        self.report[linear_input.name] = {
            "weight_error": errors,
            "mixed_error": error_curve(rows, readers, slices, low_bits=4),
            "int8_error": error_curve(rows, readers, slices, low_bits=8),
        }
        del weight, weights, stored, readers
        release_cached_memory(self.owner.builder.device)

    def measure_output_errors(self, hidden: torch.Tensor) -> None:
        """Report what INT4 activations cost the layer, for every number of INT8 blocks in each of its inputs.

        The measure is the mean over tokens of the squared error of the layer's output relative to that output: the
        residual stream, so it compares between linears and between layers. hidden: the layer's input.
        """
        layer = self.layer
        attended = layer.attended(hidden)
        middle = layer.add_attention(hidden, attended)
        mlp_input = layer.mlp_input(middle)
        activated = layer.mlp_hidden(mlp_input)
        exact = layer.add_mlp(middle, activated)
        power = exact.square().sum(-1).clamp_min(1e-30)
        for linear_input, x in zip(LINEAR_INPUTS, (layer.attention_input(hidden), attended, mlp_input, activated),
                                   strict=True):
            perm = self.done[linear_input.members[0]].perm
            assert perm is not None
            slices = self._slices(linear_input)
            curve = []
            for count in range(num_blocks(len(perm) // slices) + 1):
                changed = _round_trip(x, perm, act_bits(len(perm), slices, count))
                output = self._output(linear_input, changed, hidden, middle)
                curve.append(((output - exact).square().sum(-1) / power).mean())
            self.report[linear_input.name]["output_error"] = torch.stack(curve).tolist()  # one wait for the device

    def _output(
        self, at: LinearInput, x: torch.Tensor, hidden: torch.Tensor, middle: torch.Tensor
    ) -> torch.Tensor:
        """The layer's output with ``x`` as the input ``at``; hidden, middle: the stream before and after attention."""
        if at is QKV:
            at, x = OUT, self.layer.attention(*self.layer.qkv(x))
        if at is OUT:
            middle = self.layer.add_attention(hidden, x)
            at, x = GATE_UP, self.layer.mlp_input(middle)
        if at is GATE_UP:
            x = self.layer.mlp_hidden(x)
        return self.layer.add_mlp(middle, x)

    def _slices(self, linear_input: LinearInput) -> int:
        return self.owner.comet.tensor_parallel if linear_input.row_parallel else 1

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """Everything of the layer that goes on disk; the order of down_proj's input is folded into gate and up."""
        down = self.done[DOWN.members[0]]
        assert down.perm is not None
        for member in GATE_UP.members:
            self.done[member] = self.done[member].permute_rows(down.perm)
            bias = self.layer.linear(member).bias
            if bias is not None:
                bias.copy_(bias[down.perm])
        down.perm = None
        tensors = {f"{m}.{suffix}": t for m, q in self.done.items() for suffix, t in q.tensors().items()}
        for name, parameter in self.layer.module.named_parameters():
            if name.removesuffix(".weight") not in self.done:
                tensors[name] = parameter.detach().cpu().to(torch.bfloat16)
        if self.k_offset is not None:
            tensors[f"self_attn.{K_OFFSET}"] = self.k_offset.cpu()
        return tensors


def _round_trip(x: torch.Tensor, perm: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., K]`` as the served layer sees it in mixed mode, in x's dtype and channel order."""
    result = torch.empty_like(x)
    result[..., perm] = round_trip_activation(x[..., perm].flatten(0, -2), bits, 4).view_as(x).to(x.dtype)
    return result
