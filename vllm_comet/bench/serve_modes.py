# SPDX-License-Identifier: Apache-2.0
"""What ``comet-bench serve`` compares: model shapes, modes (engine options and the log lines that prove their kernels)
and workloads. Plain data; imports neither torch nor vLLM.

Weights are random. Every mode serves the same shape, described by a ``config.json`` whose ``quantization_config`` names
the mode's own checkpoint format, so vLLM chooses kernels exactly as it does for a real checkpoint of that format.
"""

from __future__ import annotations

import csv
import getpass
import hashlib
import json
import random
import re
import tempfile
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from vllm_comet.checkpoint import CometFormat, KVCacheFormat

GIB = 1 << 30
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                           "num_attention_heads": 32},
    "llama3-70b": _LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                            "num_attention_heads": 64},
}


def model_config(model: str) -> dict[str, Any]:
    """The config of a built-in shape or of the folder ``model``, without its ``quantization_config``."""
    if model in MODELS:
        return dict(MODELS[model])
    path = Path(model) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--model {model} is neither one of {', '.join(MODELS)} nor a folder with config.json")
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "quantization_config"}


# ---------------------------------------------------------------------------------------------------------------- modes
@dataclass(frozen=True)
class Mode:
    """One way to serve the model.

    quantization: what stands in ``config.json``; engine: options over the common ones; kv_bits: stored bits of one K or
    V value, scales included, rounded up; kernels: regular expressions that vLLM's log must match, else the mode did not
    run what it claims and its numbers are marked as those of a fallback.
    """

    quantization: dict[str, Any] | None = None
    engine: dict[str, Any] = field(default_factory=dict)
    kv_bits: float = 16
    kernels: tuple[str, ...] = ()


def _compressed(weights: dict[str, Any], activations: dict[str, Any] | None, packing: str) -> dict[str, Any]:
    """A ``compressed-tensors`` section as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": {"symmetric": True, "dynamic": False, **weights},
             "input_activations": activations, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": packing, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}


def comet_section(kv4: bool = True, group_size: int = 64, kv_group_size: int = 128) -> dict[str, Any]:
    """The section that ``comet-calibrate`` writes, by default with its default group sizes for heads of 128."""
    return CometFormat(group_size, kv_cache=KVCacheFormat(kv_group_size, k_offset=True) if kv4 else None).to_dict()


_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
_FP8 = {"num_bits": 8, "type": "float"}
_FP8_TOKEN = {**_FP8, "strategy": "token", "symmetric": True, "dynamic": True}
W4A16 = _compressed(_INT4, None, "pack-quantized")
_W4A8 = _compressed(_INT4, _FP8_TOKEN, "pack-quantized")
_W8A8 = _compressed({**_FP8, "strategy": "channel"}, _FP8_TOKEN, "float-quantized")

GRAPHS = (r"Capturing CUDA graphs \((?:PIECEWISE|mixed prefill-decode, PIECEWISE)\)",
          r"Capturing CUDA graphs \((?:FULL|decode, FULL)\)")
"""Matched in every mode on a GPU: both kinds of CUDA graphs were captured."""
_FLASH = (r"Using FLASH_ATTN attention backend", r"Using FlashAttention version 3")
_FP8_KV = (*_FLASH, r"Using fp8\S* data type to store kv cache")
_MACHETE = r"Using MacheteLinearKernel for CompressedTensorsWNA16"
_KV4 = (r"COMET 4-bit KV cache: \d+ bytes per token and KV head", r"COMET prefill: FlashAttention[^:]* over K and V")


def _comet(activations: str, kv4: bool = True) -> Mode:
    shown = r"auto → int8 \(W4A8\)" if activations == "auto" else activations
    kernels = (r"quantization=comet", rf"COMET activations: {shown}", *(_KV4 if kv4 else _FLASH))
    engine = {"additional_config": {"comet": {"activations": activations}}}
    return Mode(comet_section(kv4), engine, 5 if kv4 else 16, kernels)


MODES: dict[str, Mode] = {
    "comet": _comet("auto"),
    "comet-mixed": _comet("mixed"),
    "comet-bf16kv": _comet("auto", kv4=False),
    "bf16": Mode(kernels=(r"quantization=None", *_FLASH)),
    "fp8-fp8kv": Mode(_W8A8, {"kv_cache_dtype": "fp8"}, 8, (
        r"Selected CutlassFP8ScaledMMLinearKernel for CompressedTensorsW8A8Fp8", *_FP8_KV)),
    "w4a16": Mode(W4A16, kernels=(_MACHETE, *_FLASH)),
    "w4a16-fp8kv": Mode(W4A16, {"kv_cache_dtype": "fp8"}, 8, (_MACHETE, *_FP8_KV)),
    "w4a8-fp8": Mode(_W4A8, kernels=(r"Using CutlassW4A8LinearKernel for CompressedTensorsW4A8Fp8", *_FLASH)),
    "bf16-int4kv": Mode(engine={"kv_cache_dtype": "int4_per_token_head"}, kv_bits=5, kernels=(
        r"Using int4_per_token_head data type to store kv cache", r"Using TRITON_ATTN attention backend")),
}
BASELINE = "bf16"


def quantized_config(mode: Mode, config: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` of a checkpoint of the mode."""
    if mode.quantization is None:
        return config
    section = dict(mode.quantization)
    if section.get("kv_cache") and head_dim(config) < section["kv_cache"]["group_size"]:
        section["kv_cache"] = section["kv_cache"] | {"group_size": 32}  # the calibrator's choice for small heads
    return config | {"quantization_config": section}


def model_folder(name: str, mode: Mode, config: dict[str, Any]) -> Path:
    """A folder with nothing but the mode's ``config.json``: the same one in every run, since vLLM's cache of compiled
    graphs, which halves the time of a later start, is keyed by the path."""
    content = json.dumps(quantized_config(mode, config))
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"comet-bench-{getpass.getuser()}" / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content)
    return folder


def head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


# ------------------------------------------------------------------------------------------------------------ workloads
class Request(NamedTuple):
    """Arrival in seconds after the start, and lengths in tokens."""

    at: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Workload:
    """``offline``: all requests are there at time 0; otherwise they arrive one by one and their tokens are streamed."""

    name: str
    requests: tuple[Request, ...]
    offline: bool = True

    @property
    def tokens(self) -> int:
        return sum(r.prompt + r.output for r in self.requests)


class Profile(NamedTuple):
    """Decoding steps of ``batch`` requests, to be recorded."""

    batch: int

    def workload(self) -> Workload:
        """Short prompts, and outputs that don't end before the recording."""
        return fixed_workload(f"{self.batch}x128-768")


FIXED = ("1x128-128", "64x128-128", "16x4096-1", "128x1024-128", "32x7000-128", "64x1024-512")


def fixed_workload(name: str) -> Workload:
    """``REQUESTSxPROMPT-OUTPUT``, all at once."""
    match = re.fullmatch(r"(\d+)x(\d+)-(\d+)", name)
    if not match:
        raise ValueError(f"workload {name!r} is not of the form REQUESTSxPROMPT-OUTPUT, as {FIXED[0]}")
    count, prompt, output = map(int, match.groups())
    return Workload(name, (Request(0.0, prompt, output),) * count)


def replay_workload(trace: Path, rate: float, seconds: float, max_model_len: int) -> Workload:
    """The first ``rate · seconds`` requests of a trace (columns TIMESTAMP, ContextTokens, GeneratedTokens).

    The trace's own arrival times, burstiness included, scaled so that ``rate`` requests arrive a second on average.
    Lengths that do not fit the model are clipped: the output to half of ``max_model_len``, then the prompt to the rest.
    """
    with trace.open(newline="") as file:
        rows = [row for _, row in zip(range(round(rate * seconds)), csv.DictReader(file), strict=False)]
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    if len(rows) < max(2, round(rate * seconds)):
        raise ValueError(f"{trace} has {len(rows)} requests; rate {rate} for {seconds} s needs {round(rate * seconds)}")
    scale = (len(rows) / rate) / (times[-1] - times[0])
    requests = []
    for row, time in zip(rows, times, strict=True):
        output = max(1, min(int(row["GeneratedTokens"]), max_model_len // 2))
        prompt = max(1, min(int(row["ContextTokens"]), max_model_len - output))
        requests.append(Request((time - times[0]) * scale, prompt, output))
    return Workload(f"azure-conv@{rate:g}", tuple(requests), offline=False)


def prompts(workload: Workload, vocabulary: int, seed: str) -> list[list[int]]:
    """Random token ids per request. No two prompts of a run share a prefix worth caching."""
    generator = random.Random(f"{seed} {workload.name}")
    return [generator.choices(range(3, vocabulary), k=request.prompt) for request in workload.requests]


# -------------------------------------------------------------------------------------------------------------- engines
def engine_options(mode: Mode, config: dict[str, Any], max_model_len: int, graph_sizes: list[int]) -> dict[str, Any]:
    """Engine arguments of a mode, less the model's folder and the size of the KV cache; the same for all but
    ``mode.engine``. ``graph_sizes`` empty runs eagerly."""
    compilation = {"enforce_eager": True} if not graph_sizes else {
        "compilation_config": {"cudagraph_capture_sizes": graph_sizes}}
    return {
        "skip_tokenizer_init": True, "load_format": "dummy", "dtype": config.get("dtype", "bfloat16"), "seed": 0,
        "max_model_len": max_model_len, "max_num_seqs": 256, "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False, "disable_log_stats": False, **compilation, **mode.engine,
    }  # fmt: skip


def kv_bytes(mode: Mode, config: dict[str, Any], tokens: int) -> int:
    """Bytes of K and V of ``tokens`` tokens, with 3 % and 4,096 tokens for partly filled pages."""
    heads = config.get("num_key_value_heads", config["num_attention_heads"])
    values = 2 * config["num_hidden_layers"] * heads * head_dim(config)
    return int(1.03 * (tokens + 4096) * values * mode.kv_bits / 8)
