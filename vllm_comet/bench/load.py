# SPDX-License-Identifier: Apache-2.0
"""``comet-bench load``: how long vLLM takes to load a COMET checkpoint and its own W4A16 one, and the peak GPU memory.

Writes a random checkpoint of each format in the same shape, then has vLLM's default loader load them in turn,
``--rounds`` times in one process. The files were just written, so they come from the page cache: what differs is the
work per tensor, not the disk. The first round compiles our GEMM kernels unless Triton's cache holds them. ``verify_s``
is the check of every checksum that a COMET checkpoint gets before it is loaded; vLLM's formats have none.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from vllm_comet import checkpoint as ck
from vllm_comet.bench import timing
from vllm_comet.bench.serve_modes import GIB, MODELS, MODES, head_dim, model_config, quantized_config
from vllm_comet.kernels.tiles import table_name

FORMATS = ("comet", "w4a16")
INT8_SHARE = 0.16
LAYERS_A_SHARD = 4
Tensors = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------------------- random checkpoints
def write_checkpoint(folder: Path, config: dict[str, Any], kind: str) -> int:
    """Write a random checkpoint of ``config``'s shape in the format of mode ``kind`` and return its bytes.

    All layers hold the same random tensors, drawn once.
    """
    folder.mkdir(parents=True)
    section = quantized_config(MODES[kind], config)
    (folder / "config.json").write_text(json.dumps(section))
    linear = comet_linear if kind == "comet" else w4a16_linear
    layer = dict(decoder_layer(config, linear))
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    ends = {"model.embed_tokens.weight": bf16(vocabulary, hidden), "lm_head.weight": bf16(vocabulary, hidden),
            "model.norm.weight": bf16(hidden)}
    numbers = range(config["num_hidden_layers"])
    shards = [ends] + [
        {f"model.layers.{i}.{name}": tensor.clone() for i in numbers[first : first + LAYERS_A_SHARD]
         for name, tensor in layer.items()} for first in numbers[::LAYERS_A_SHARD]]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name, shard: ck.save_shard(shard, folder / name), names, shards))
    index = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(tensor.nbytes for shard in shards for tensor in shard.values())


def decoder_layer(config: dict[str, Any], linear: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of one Llama decoder layer."""
    hidden, ff, dim = config["hidden_size"], config["intermediate_size"], head_dim(config)
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, q), "mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden),
              "mlp.down_proj": (hidden, ff)}
    for name, (n, k) in shapes.items():
        for suffix, tensor in linear(n, k, folded=name == "mlp.down_proj").items():
            yield f"{name}.{suffix}", tensor
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield f"{norm}.weight", bf16(hidden)
    if linear is comet_linear:
        yield f"self_attn.{ck.K_OFFSET}", torch.zeros(config["num_key_value_heads"], dim)


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-1e-2, 1e-2)


def random_words(n: int, words: int) -> torch.Tensor:
    return torch.empty(n, words, dtype=torch.int32).random_(-(2**31), 2**31 - 1)


def comet_linear(n: int, k: int, folded: bool) -> Tensors:
    """Layers with the same input share a permutation, so every layer of the same k gets the same one."""
    group_size = MODES["comet"].quantization["group_size"]
    blocks = ck.num_blocks(k)
    bits = torch.full((blocks,), 4, dtype=torch.uint8)
    bits[blocks - round(INT8_SHARE * blocks):] = 8
    tensors = {
        ck.WEIGHT_PACKED: random_words(n, k // 8),
        ck.WEIGHT_SCALE: torch.empty(n).uniform_(1e-4, 1e-3),
        ck.WEIGHT_GROUP_SCALE: torch.randint(1, 17, (n, ck.num_groups(k, group_size)), dtype=torch.uint8),
        ck.ACT_BITS_NAME: bits,
    }
    perm = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(torch.int32)
    return tensors if folded else tensors | {ck.INPUT_PERM: perm}


def w4a16_linear(n: int, k: int, folded: bool) -> Tensors:
    """compressed-tensors' pack-quantized, groups of 128."""
    return {"weight_packed": random_words(n, k // 8), "weight_scale": bf16(n, k // 128),
            "weight_shape": torch.tensor([n, k])}


# ---------------------------------------------------------------------------------------------------------- measuring
def load_once(folder: Path) -> dict[str, float]:
    """Load with vLLM's default loader, no engine; seconds, and GiB on the GPU: held afterwards, and the peak."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.workspace import init_workspace_manager, is_workspace_manager_initialized

    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    if not is_workspace_manager_initialized():  # as a worker does; attention layers reserve their part when built
        init_workspace_manager(device)
    config = EngineArgs(model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=2048,
                        load_format="safetensors").create_engine_config()
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile() as rendezvous:
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{rendezvous.name}", 0, "nccl")
            ensure_model_parallel_initialized(1, 1)
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        model = get_model(vllm_config=config)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    row = {"load_s": round(seconds, 2), "held_gib": round(torch.cuda.memory_allocated() / GIB, 3),
           "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 3)}
    del model, config
    gc.collect()
    torch.cuda.empty_cache()
    return row


def verify_seconds(folder: Path) -> float:
    started = time.perf_counter()
    ck.verify_checkpoint(folder)
    return round(time.perf_counter() - started, 2)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comet-bench load", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3-8b",
                        help=f"one of {', '.join(MODELS)}, or a folder with config.json (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="write the checkpoints here and keep them")
    parser.add_argument("--out", type=Path, help="results file; default examples/results/load-<gpu>.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: this benchmark measures GPU memory")
    config = model_config(args.model)
    os.environ["VLLM_COMET_VERIFY"] = "0"  # timed apart
    rows: list[dict[str, Any]] = []
    environment = timing.environment()
    out = args.out or Path("examples/results") / f"load-{table_name(environment['device'])}.json"
    with contextlib.ExitStack() as stack:
        root = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="comet-bench-")))
        for kind in FORMATS:
            started = time.perf_counter()
            size = write_checkpoint(root / kind, config, kind)
            print(f"{kind}: {size / GIB:.2f} GiB written in {time.perf_counter() - started:.1f} s", file=sys.stderr)
        verify_s = verify_seconds(root / "comet")
        for number, kind in ((i, kind) for i in range(args.rounds) for kind in FORMATS):
            row = {"model": Path(args.model).name, "mode": kind, "round": number} | load_once(root / kind)
            rows.append(row | {"verify_s": verify_s if kind == "comet" else 0.0})
            timing.write_results(out, rows, environment)
            print(rows[-1])
    return 0
