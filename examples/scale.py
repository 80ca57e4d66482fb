# SPDX-License-Identifier: Apache-2.0
"""Time and memory of calibrating models too large to ship with the code: random weights of the true shapes.

    python examples/scale.py llama3-8b:32 llama3-70b:4 --out scale-h100.json

NAME:LAYERS calibrates the first LAYERS layers on random tokens and projects the whole model from the layers after the
first. A layer's weights are drawn when it is its turn, so neither a disk for the model nor the time to read it is
counted; writing the layer's 4-bit tensors is. The export at the end (copying them into shards) is not.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from calibrate.decoder import DecoderBuilder
from calibrate.export import Workspace
from calibrate.hidden import (
    HiddenStore,
    Streams,
    avoid_fragmentation,
    calibration_devices,
    default_device_budget,
    default_host_budget,
)
from calibrate.layer import LayerCalibrator
from calibrate.models import Dims, choose_tensor_parallel, family_of
from calibrate.pipeline import CHUNK_TOKENS, Options, activation_dtype, calibrate_layer, kv_format
from calibrate.plan import Plan
from vllm_comet.bench.timing import environment, write_results
from vllm_comet.checkpoint import CometFormat

_COMMON = dict(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192,
               rope_parameters={"rope_type": "default", "rope_theta": 5e5})
MODELS = {
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "llama3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8),
}


def random_layer(builder: DecoderBuilder, seed: int) -> dict[str, torch.Tensor]:
    """bf16 weights of one layer in host memory, as they come from a file."""
    generator = torch.Generator(builder.device).manual_seed(seed)
    weights = {}
    for name, parameter in builder.skeleton(0).named_parameters():
        shape = parameter.shape
        value = torch.randn(shape, generator=generator, device=builder.device) * shape[-1] ** -0.5
        weights[name] = (value if len(shape) == 2 else torch.ones_like(value)).to(torch.bfloat16).cpu()
    return weights


def host_peak_bytes() -> int:
    """Largest resident set of this process so far."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def measure(
    name: str, layers: int, samples: int, length: int, host_memory: int, gpu_memory: float | None, folder: str,
    limit: float,
) -> dict[str, Any]:  # fmt: skip
    """One row; no layer begins that would end after ``limit`` seconds if it took as long as the one before."""
    begin = time.perf_counter()
    avoid_fragmentation()
    config = LlamaConfig(**_COMMON, **MODELS[name], architectures=["LlamaForCausalLM"])
    devices = calibration_devices()
    device, gpus = devices[0], devices if devices[0].type == "cuda" else ()
    if gpu_memory is not None:
        for gpu in gpus:
            total = torch.cuda.get_device_properties(gpu).total_memory
            torch.cuda.set_per_process_memory_fraction(gpu_memory * 2**30 / total, gpu)
    dims, options = Dims.of(config), Options()
    comet = CometFormat(options.group_size, kv_cache=kv_format(options, dims),
                        tensor_parallel=choose_tensor_parallel(dims, None))
    seconds = []
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder) as scratch:
        builder = DecoderBuilder(config, family_of(config), device, activation_dtype(device))
        calibrator = LayerCalibrator(builder, comet, options.damping, devices)
        workspace = Workspace(Path(scratch) / "out", {}, resume=False)
        plan = Plan(dims, builder.family, comet, 0, samples * length, devices,
                    min(map(default_device_budget, devices)), host_memory)
        store = HiddenStore(device, plan.room, Path(scratch) / "hidden")
        embedding = torch.randn(config.vocab_size, dims.hidden, device=device).to(torch.bfloat16).cpu()
        tokens = torch.randint(config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
        chunks = tokens.split(max(1, CHUNK_TOKENS // length))
        streams = Streams.start(store, len(chunks), tokens.numel(), (builder.embed(c, embedding) for c in chunks))
        del embedding
        torch.cuda.empty_cache()
        for index in range(layers):
            weights = random_layer(builder, index)
            start = time.perf_counter()
            calibrate_layer(weights, index, calibrator, workspace, streams)
            seconds.append(round(time.perf_counter() - start, 2))
            print(f"{name} layer {index}: {seconds[-1]} s", flush=True)
            if time.perf_counter() - begin + seconds[-1] > limit:
                break
    steady = seconds[1:] or seconds
    return {"model": name, "samples": samples, "length": length, "layers": len(seconds), "of_layers": dims.layers,
            "layer_seconds": seconds, "projected_minutes": round(sum(steady) / len(steady) * dims.layers / 60, 1),
            "host_peak_gib": round(host_peak_bytes() / 2**30, 2), "spilled_gib": round(store.spilled / 2**30, 2),
            "gpus": len(gpus),
            "gpu_peak_gib": round(max(map(torch.cuda.max_memory_reserved, gpus)) / 2**30, 2) if gpus else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME:LAYERS", help=f"names: {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--host-memory", type=float, help="GiB of hidden states kept in memory (default: half of it)")
    parser.add_argument("--gpu-memory", type=float, help="GiB of GPU memory it may take, as on a card of that size")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no layer that would end later")
    parser.add_argument("--folder", help="where working files go (default: the system's folder for such)")
    parser.add_argument("--commit", help="what was measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.gpu_memory is not None and not torch.cuda.is_available():
        parser.error("--gpu-memory needs a CUDA GPU, and there is none; leave it out")
    budget = default_host_budget() if args.host_memory is None else int(args.host_memory * 2**30)
    rows = []
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) for _ in args.models]  # a peak each
    for pool in pools:
        pool.submit(time.time)  # imports while the first model runs
    for model, pool in zip(args.models, pools, strict=True):
        name, _, layers = model.partition(":")
        rows.append(pool.submit(measure, name, int(layers), args.samples, args.length, budget, args.gpu_memory,
                                args.folder, args.seconds).result())
        pool.shutdown()
        print(rows[-1], flush=True)
        options = ("samples", "length", "host_memory", "gpu_memory", "seconds")
        given = [f"--{key.replace('_', '-')} {value}" for key, value in vars(args).items()
                 if key in options and value != parser.get_default(key)]
        env = environment() | {"command": " ".join(["python examples/scale.py", *args.models, *given,
                                                    f"--out {args.out.name}"])}
        write_results(args.out, rows, env | ({"commit": args.commit} if args.commit else {}))


if __name__ == "__main__":
    sys.exit(main())
