# SPDX-License-Identifier: Apache-2.0
"""The calibration run: embed the text, then layer by layer observe, quantise and propagate; at the end spend the INT8
budget and write the checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from calibrate.data import load_text, token_windows
from calibrate.decoder import DecoderBuilder, DecoderLayer
from calibrate.errors import CalibrationError
from calibrate.export import ShardWriter, Workspace, write_metadata, write_report
from calibrate.fmpq import Candidate, act_bits, allocate
from calibrate.fused import split_tensors
from calibrate.grid import dequantize
from calibrate.hidden import HiddenStates, HiddenStore, Streams, avoid_fragmentation, calibration_devices
from calibrate.layer import LayerCalibrator
from calibrate.loading import ModelSource
from calibrate.models import LINEAR_INPUTS, Dims, Family, check_dims, choose_tensor_parallel, family_of
from calibrate.plan import Limits, Plan
from calibrate.rotate import Rotation, rotated
from vllm_comet import checkpoint as fmt

CHUNK_TOKENS = 8192
BUDGET_ERROR = "output_error"
"""The entry of a layer's report that the INT8 budget lowers."""
_MOST_SAMPLES = 128
_NO_LIMITS = Limits()


@dataclass(frozen=True)
class Options:
    """Everything that decides what is written; two runs with equal options and inputs give equal bytes."""

    data: Path | None = None
    samples: int | None = None
    length: int = 1024
    seed: int = 0
    group_size: int = 64
    int8_share: float = 0.16
    kv4: bool = True
    kv_group_size: int | None = None
    tensor_parallel: int | None = None
    damping: float = 0.1
    rotation: Rotation = "none"
    tune: int = 0


@dataclass(frozen=True)
class Result:
    """What a finished run reports."""

    num_bytes: int
    base_bytes: int
    int8_share: float
    layers: list[dict[str, Any]]


def activation_dtype(device: torch.device) -> torch.dtype:
    """bf16, as the model is served, where the machine multiplies it faster than float32."""
    return torch.bfloat16 if device.type == "cuda" or torch.cpu._is_amx_tile_supported() else torch.float32


def kv_format(options: Options, dims: Dims) -> fmt.KVCacheFormat | None:
    """The KV section of the checkpoint; raises CalibrationError for a group size that can't be.

    By default a head of 128 channels is one group, any other is cut in groups of 32. 64 channels hold as many outliers
    as 128 do, and SmolLM2-135M, with such heads, loses half as much perplexity. Gemma-3's heads of 256 pass a norm that
    leaves K smoothing little to do; its 270M loses half as much too.
    """
    if not options.kv4:
        return None
    allowed = [g for g in fmt.KV_GROUP_SIZES if dims.head_dim % g == 0]
    if not allowed:
        raise CalibrationError(f"head_dim {dims.head_dim} is no multiple of a KV group size {fmt.KV_GROUP_SIZES}: the "
                               "4-bit KV cache can't hold it; use --no-kv4.")
    size = options.kv_group_size or (128 if dims.head_dim == 128 else 32)
    if size not in allowed:
        raise CalibrationError(f"--kv-group-size {size} does not fit head_dim {dims.head_dim}; allowed: {allowed}.")
    return fmt.KVCacheFormat(size, k_offset=True)


def prepare(source: ModelSource, options: Options, limits: Limits = _NO_LIMITS) -> tuple[Plan, torch.Tensor]:
    """What a run would do, and its calibration tokens ``[samples, length]``. Raises CalibrationError."""
    source = rotated(source, options.rotation, options.seed)
    config = source.config()
    family, dims = family_of(config), Dims.of(config)
    check_dims(dims)
    comet = fmt.CometFormat(
        group_size=options.group_size, kv_cache=kv_format(options, dims),
        tensor_parallel=choose_tensor_parallel(dims, options.tensor_parallel), producer=_producer(options))
    if options.length > config.max_position_embeddings:
        raise CalibrationError(f"--length {options.length}: the model has {config.max_position_embeddings} positions.")
    tokenizer = source.tokenizer()
    text = load_text(options.data, tokenizer)
    windows = token_windows(text, tokenizer, options.samples, options.length, options.seed, _MOST_SAMPLES)
    avoid_fragmentation()
    plan = Plan.of(source, dims, family, comet, windows.numel(), calibration_devices(), limits)
    return plan, windows


def calibrate(source: ModelSource, out: Path, options: Options, resume: bool = False,
              limits: Limits = _NO_LIMITS) -> Result:
    """Quantise ``source`` into the new folder ``out``; see :class:`Options`. Raises CalibrationError."""
    plan, windows = prepare(source, options, limits)
    source = rotated(source, options.rotation, options.seed)
    family, dims, comet, device = plan.family, plan.dims, plan.comet, plan.device
    embedding = source.tensor("model.embed_tokens.weight")
    run = {key: str(value) for key, value in asdict(options).items() if key != "data"}
    run |= {"samples' tokens": fmt.tensor_crc32(windows), "model's embedding": fmt.tensor_crc32(embedding)}
    workspace = Workspace(out, run, resume, plan.disk)
    with torch.no_grad(), workspace.scratch() as scratch:
        builder = DecoderBuilder(source.config(), family, device, activation_dtype(device))
        calibrator = LayerCalibrator(builder, comet, options.damping, plan.devices)
        store = HiddenStore(device, plan.room, scratch)
        chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
        streams = Streams.start(store, len(chunks), windows.numel(), (builder.embed(c, embedding) for c in chunks))
        del embedding
        for index in tqdm(range(dims.layers), unit="layer", desc="calibrating", dynamic_ncols=True):
            calibrate_layer(layer_tensors(source, index, family, dims), index, calibrator, workspace, streams)
        del streams
    return _export(source, workspace, comet, dims, options, device)


def layer_tensors(source: ModelSource, index: int, family: Family, dims: Dims) -> dict[str, torch.Tensor]:
    """The float tensors of layer ``index``, one a projection, names relative to the layer."""
    tensors = source.module_tensors(f"model.layers.{index}")
    return split_tensors(tensors, dims) if family.fused else tensors


def calibrate_layer(original: dict[str, torch.Tensor], index: int, calibrator: LayerCalibrator, workspace: Workspace,
                    streams: Streams) -> None:
    """Quantise layer ``index``, unless an earlier run did, and replace the hidden states by its outputs."""
    builder, mark = calibrator.builder, fingerprint(original)
    if workspace.has_layer(index):
        if workspace.load_report(index)["model"] != mark:
            raise CalibrationError(f"--resume: layer {index} of the model is not what the interrupted run read; "
                                   f"remove {workspace.partial} to start again.")
        _propagate(builder.build(index, original, builder.dtype), streams.exact)
    else:
        tensors, report = calibrator.run(index, original, streams)
        workspace.save_layer(index, tensors, report | {"model": mark})
    _propagate(load_quantized(builder, index, workspace.load_layer(index), calibrator.comet), streams.hidden)


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of up to 4096 values of every tensor, spread evenly: another model of the same shape has another one."""
    samples = (t.flatten()[:: max(1, t.numel() // 4096)].to(torch.float32) for _, t in sorted(tensors.items()))
    return fmt.tensor_crc32(torch.cat(list(samples)))


def load_quantized(
    builder: DecoderBuilder, index: int, tensors: dict[str, torch.Tensor], comet: fmt.CometFormat
) -> DecoderLayer:
    """The decoder layer that computes with the dequantised weights of ``tensors`` (names relative to the layer)."""
    plain = {name: t for name, t in tensors.items()
             if name.rsplit(".", 1)[1] not in (*fmt.COMET_SUFFIXES, fmt.K_OFFSET)}
    for name in tensors:
        prefix, _, suffix = name.rpartition(".")
        if suffix == fmt.WEIGHT_PACKED:
            stored = {s: tensors[f"{prefix}.{s}"].to(builder.device)
                      for s in fmt.COMET_SUFFIXES if f"{prefix}.{s}" in tensors}
            plain[f"{prefix}.weight"] = dequantize(stored, comet.group_size).to(builder.dtype)
    return builder.build(index, plain, builder.dtype)


def _propagate(layer: DecoderLayer, states: HiddenStates) -> None:
    finite = torch.ones((), dtype=torch.bool, device=layer.builder.device)
    for i, hidden in enumerate(states):
        states[i] = output = layer.forward(hidden)
        finite &= torch.isfinite(output).all()
    if not bool(finite):  # asked once: every answer waits for the device
        raise CalibrationError(f"the output of model.layers.{layer.index} is NaN or infinite on the calibration text; "
                               "check the model's weights.")


def _export(source: ModelSource, workspace: Workspace, comet: fmt.CometFormat, dims: Dims, options: Options,
            device: torch.device) -> Result:
    reports = [workspace.load_report(index) for index in range(dims.layers)]
    candidates = [
        Candidate(dims.width(i), len(i.members), comet.tensor_parallel if i.row_parallel else 1,
                  tuple(report[i.name][BUDGET_ERROR]))
        for report in reports for i in LINEAR_INPUTS
    ]
    counts = iter(zip(candidates, allocate(candidates, options.int8_share), strict=True))
    folder = workspace.begin_checkpoint()
    writer = ShardWriter(folder)
    writer.add({name: source.tensor(name).to(torch.bfloat16) for name in source.names
                if not name.startswith("model.layers.") and not source.is_tied_head(name)})
    for index, report in enumerate(reports):
        tensors = workspace.load_layer(index)
        for linear_input in LINEAR_INPUTS:
            candidate, count = next(counts)
            report[linear_input.name].update(int8_blocks=count * candidate.slices, int8_blocks_per_slice=count)
            bits = act_bits(candidate.k, candidate.slices, count)
            tensors.update({f"{member}.{fmt.ACT_BITS_NAME}": bits.clone() for member in linear_input.members})
        writer.add({f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()})
    writer.close()
    write_metadata(source, source.config(), comet, folder)
    write_report(folder, reports)
    if options.tune:
        _tune(source, folder, options, device)
    summary = workspace.finish()
    return Result(summary.num_bytes, source.bf16_bytes(), summary.int8_share, reports)


def _tune(source: ModelSource, folder: Path, options: Options, device: torch.device) -> None:
    """Train the checkpoint in ``folder`` on all of the calibration text, not only on the samples of the layers."""
    from calibrate.tune import TuneOptions, tune_checkpoint

    tokenizer = source.tokenizer()
    windows = token_windows(load_text(options.data, tokenizer), tokenizer, None, options.length, options.seed, 2**31)
    tune_checkpoint(source.directory, folder, windows, TuneOptions(steps=options.tune, seed=options.seed), device)


def _producer(options: Options) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(options).items() if key != "data"}
    return {"tool": "comet-calibrate", "data": options.data.name if options.data else "default", **settings}
