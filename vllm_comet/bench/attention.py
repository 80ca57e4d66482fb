# SPDX-License-Identifier: Apache-2.0
"""``comet-bench attention``: attention over the 4-bit KV cache beside FlashAttention-3 and vLLM's 4-bit cache.

Phases: ``decode`` (one token a request), ``prefill`` (fresh prompts, storing included), ``chunk`` (the last 2,048
tokens of a longer prompt, storing included), ``store`` (beside a copy of as many bytes). ``comet-int4`` prefills as
the backend does, by FlashAttention over dequantised K and V; ``comet-int4-pages`` by the kernel that reads the pages.
Every call runs in a CUDA graph over caches that together exceed the L2 several times. A mode whose library is missing
is left out and said so.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vllm_comet.bench.timing import environment, graph_us, write_results
from vllm_comet.kernels.kv4_cache import bytes_per_token, store_kv
from vllm_comet.kernels.kv4_decode import decode, make_scratch, plan
from vllm_comet.kernels.kv4_prefill import flash_attention, gather_kv, prefill

BLOCK = 16
CHUNK = 2048
GRAPH_CALLS = 20
"""Decode calls in a graph, at least: its launch, about 8 us, is spread over them."""
ROTATED_BYTES = 200_000_000
"""Calls of a graph read at least this many different bytes in turn (an H200's L2 holds 60 MB)."""


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    group_size: int = 128
    """Channels with one scale, at most; of ``comet-int4``."""


MODELS = {
    "8b": Shape(32, 8, 128),
    "70b": Shape(64, 8, 128),
    "7-per-group": Shape(56, 8, 128),
    "head-dim-64": Shape(32, 8, 64),
    "head-dim-64-groups-32": Shape(32, 8, 64, 32),
    "head-dim-256": Shape(32, 8, 256),
    "head-dim-256-groups-64": Shape(32, 8, 256, 64),
    "head-dim-256-groups-32": Shape(32, 8, 256, 32),
}
VARIATIONS = tuple(name for name in MODELS if name not in ("8b", "70b"))
"""Of 8b, to see what the shape of the heads costs: decode only, beside FlashAttention-3 in bf16 only."""
DECODE = [(1, 4096), (1, 16384), (1, 65536), (1, 131072), (16, 4096), (32, 8192), (64, 2048), (128, 1024)]
PREFILL = [(16, 4096)]
CHUNKS = [(1, 30 * 1024 + CHUNK)]
STORE = 8192
PREFILL_ONLY = ("fa3-bf16-dense", "comet-int4-pages")
Calls = list[Callable[[], Any]]


def _ints(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _tables(batch: int, context: int, pages: int, bytes_per_call: int) -> list[torch.Tensor]:
    """Block tables over disjoint random pages, as many as the pool and ROTATED_BYTES ask for."""
    width = -(-context // BLOCK)
    need = batch * width
    count = min(pages // need, max(2, -(-ROTATED_BYTES // bytes_per_call)))
    order = torch.randperm(pages, device="cuda").to(torch.int32)
    return [order[i * need : (i + 1) * need].view(batch, width) for i in range(count)]


def _pool_tokens(batch: int, context: int, token_bytes: int) -> int:
    return batch * context * max(2, -(-ROTATED_BYTES // (batch * context * token_bytes))) + BLOCK


class Comet:
    """The kernels of this package."""

    name = "comet-int4"

    def __init__(self, shape: Shape, tokens: int):
        self.shape, self.group_size = shape, min(shape.head_dim, shape.group_size)
        content = bytes_per_token(shape.head_dim, self.group_size)
        self.token_bytes = shape.kv_heads * content
        pages = -(-tokens // BLOCK)
        self.cache = torch.empty(pages, shape.kv_heads, BLOCK, content, dtype=torch.uint8, device="cuda")
        self.k_offset = torch.randn(shape.kv_heads, shape.head_dim, device="cuda")
        key, value = torch.randn(2, 64 * BLOCK, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        for start in range(0, pages * BLOCK, len(key)):
            slots = torch.arange(start, min(start + len(key), pages * BLOCK), device="cuda")
            store_kv(key, value, self.cache, slots, self.group_size)
        self.scale = shape.head_dim**-0.5

    def decode(self, q: torch.Tensor, batch: int, context: int) -> Calls:
        shape, out = self.shape, torch.empty_like(q)
        scratch = make_scratch(batch, shape.heads, shape.kv_heads, shape.head_dim, q.device)
        plan(_ints([context] * batch), None, shape.head_dim, scratch)
        tables = _tables(batch, context, len(self.cache), batch * context * self.token_bytes)
        return [
            lambda t=t: decode(q, self.cache, t, self.group_size, self.scale, None, out, scratch) for t in tables
        ]  # fmt: skip

    def prefill(
        self, q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: int, context: int, flash: Any
    ) -> Calls:
        """Store the newest tokens, then attend: by FlashAttention over K and V as stored, or over the pages if None."""
        queries, out = len(q) // batch, torch.empty_like(q)
        table = _tables(batch, context, len(self.cache), ROTATED_BYTES)[0]
        position = torch.arange(context - queries, context, device="cuda")
        slots = (table[:, position // BLOCK].long() * BLOCK + position % BLOCK).flatten()
        starts, ends = _ints([i * queries for i in range(batch + 1)]), _ints([i * context for i in range(batch + 1)])
        lens = _ints([context] * batch)
        workspace = torch.empty(2, batch * context, *key.shape[1:], dtype=key.dtype, device="cuda").unbind()

        fresh = flash is not None and queries == context

        def run() -> None:
            store_kv(key, value, self.cache, slots, self.group_size, *(workspace if fresh else (None, None)),
                     self.k_offset)
            if flash is None:
                prefill(q, self.cache, table, starts, lens, queries, self.group_size, self.scale, None, out)
                return
            if not fresh:
                gather_kv(self.cache, table, ends, context, self.group_size, *workspace)
            flash_attention(flash, q, *workspace, starts, ends, queries, context, self.scale, None, out)

        return [run]


def _flash() -> Callable[..., Any]:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return functools.partial(flash_attn_varlen_func, fa_version=3)


class Flash3:
    """vLLM's FlashAttention-3 over its paged cache, in bf16 or with FP8 queries, keys and values."""

    def __init__(self, shape: Shape, tokens: int, fp8: bool):
        self.shape, self.fp8 = shape, fp8
        self.name = "fa3-fp8" if fp8 else "fa3-bf16"
        self.dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        self.token_bytes = 2 * shape.kv_heads * shape.head_dim * self.dtype.itemsize
        pages = -(-tokens // BLOCK)
        page = torch.randn(2, 1, BLOCK, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
        self.key, self.value = (x.repeat(pages, 1, 1, 1).to(self.dtype) for x in page)
        self.flash = _flash()

    def _calls(self, q: torch.Tensor, batch: int, context: int, tables: list[torch.Tensor], metadata: Any) -> Calls:
        out, q = torch.empty_like(q), q.to(self.dtype)
        starts = _ints([i * (len(q) // batch) for i in range(batch + 1)])
        scales = {}
        if self.fp8:
            one = torch.ones(batch, self.shape.kv_heads, device="cuda")
            scales = {"q_descale": one, "k_descale": one, "v_descale": one}
        lens = _ints([context] * batch)
        return [
            lambda t=t: self.flash(
                q, self.key, self.value, max_seqlen_q=len(q) // batch, cu_seqlens_q=starts, max_seqlen_k=context,
                seqused_k=lens, causal=True, block_table=t, out=out, scheduler_metadata=metadata,
                **scales,
            )
            for t in tables
        ]  # fmt: skip

    def decode(self, q: torch.Tensor, batch: int, context: int, scheduled: bool) -> Calls:
        from vllm.vllm_flash_attn import get_scheduler_metadata

        metadata = None
        if scheduled:
            metadata = get_scheduler_metadata(
                batch_size=batch, max_seqlen_q=1, max_seqlen_k=context, num_heads_q=self.shape.heads,
                num_heads_kv=self.shape.kv_heads, headdim=self.shape.head_dim, cache_seqlens=_ints([context] * batch),
                qkv_dtype=self.dtype, cu_seqlens_q=_ints(list(range(batch + 1))), page_size=BLOCK, causal=True,
            )  # fmt: skip
        tables = _tables(batch, context, len(self.key), batch * context * self.token_bytes)
        return self._calls(q, batch, context, tables, metadata)

    def prefill(self, q: torch.Tensor, batch: int, context: int) -> Calls:
        """Attention alone; the cost of storing bf16 is left out, in its favour."""
        return self._calls(q, batch, context, _tables(batch, context, len(self.key), ROTATED_BYTES)[:1], None)


def _dense_prefill(q: torch.Tensor, shape: Shape, batch: int, context: int) -> Calls:
    """FlashAttention-3 over K and V that lie one behind the other, no pages: what our workspace is to it."""
    key, value = torch.randn(2, batch * context, shape.kv_heads, shape.head_dim, dtype=q.dtype, device="cuda")
    starts, ends = (_ints([i * n for i in range(batch + 1)]) for n in (len(q) // batch, context))
    flash, out = _flash(), torch.empty_like(q)
    return [
        lambda: flash(q, key, value, max_seqlen_q=len(q) // batch, cu_seqlens_q=starts, max_seqlen_k=context,
                      cu_seqlens_k=ends, causal=True, out=out)
    ]  # fmt: skip


class VllmInt4:
    """vLLM's ``int4_per_token_head`` cache with its own Triton kernels, called as its Triton backend does."""

    name = "vllm-int4"

    def __init__(self, shape: Shape, tokens: int):
        self.shape = shape
        pages = -(-tokens // BLOCK)
        self.token_bytes = 2 * shape.kv_heads * (shape.head_dim // 2 + 4)
        codes = (pages, BLOCK, shape.kv_heads, shape.head_dim // 2)
        self.key, self.value = (torch.randint(0, 256, codes, dtype=torch.uint8, device="cuda") for _ in range(2))
        self.scales = [torch.rand(codes[:3], device="cuda") * 0.1 for _ in range(2)]

    def calls(self, q: torch.Tensor, batch: int, context: int) -> Calls:
        from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

        heads, head_dim, segments = self.shape.heads, self.shape.head_dim, 16
        rows = max(1, 128 // self.shape.kv_heads)
        output = torch.empty(rows, heads, segments, head_dim, device="cuda")
        limits = [torch.empty(rows, heads, segments, device="cuda") for _ in range(2)]
        out, starts = torch.empty_like(q), _ints([i * (len(q) // batch) for i in range(batch + 1)])
        lens = _ints([context] * batch)
        tables = _tables(batch, context, len(self.key), batch * context * self.token_bytes)
        return [
            lambda t=t: unified_attention_int4(
                q, self.key, self.value, out, cu_seqlens_q=starts, max_seqlen_q=len(q) // batch, seqused_k=lens,
                max_seqlen_k=context, softmax_scale=head_dim**-0.5, window_size=(-1, -1), block_table=t, softcap=0.0,
                sinks=None, alibi_slopes=None, use_alibi_sqrt=False, qq_bias=None, output_scale=None,
                mm_prefix_range=None, k_scale_cache=self.scales[0], v_scale_cache=self.scales[1], seq_threshold_3D=rows,
                num_par_softmax_segments=segments, softmax_segm_output=output, softmax_segm_max=limits[0],
                softmax_segm_expsum=limits[1],
            )
            for t in tables
        ]  # fmt: skip


def _decode_row(mode: str, shape: Shape, batch: int, context: int) -> tuple[float, int]:
    """Microseconds of a call and the bytes of cache it reads."""
    q = torch.randn(batch, shape.heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    full = 4 * shape.kv_heads * shape.head_dim
    tokens = _pool_tokens(batch, context, full // {"fa3-bf16": 1, "fa3-fp8": 2}.get(mode, 4))
    if mode == "comet-int4":
        cache: Any = Comet(shape, tokens)
        us = graph_us(cache.decode(q, batch, context), GRAPH_CALLS)
    elif mode == "vllm-int4":
        cache = VllmInt4(shape, tokens)
        us = graph_us(cache.calls(q, batch, context), GRAPH_CALLS)
    else:  # with and without the scheduler's metadata: the faster counts
        cache = Flash3(shape, tokens, mode == "fa3-fp8")
        us = min(graph_us(cache.decode(q, batch, context, scheduled), GRAPH_CALLS) for scheduled in (True, False))
    return us, batch * context * cache.token_bytes


def _prefill_us(mode: str, shape: Shape, batch: int, context: int, queries: int) -> float:
    q = torch.randn(batch * queries, shape.heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, len(q), shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    tokens = 2 * batch * context
    if mode.startswith("comet-int4"):
        flash = None if mode == "comet-int4-pages" else _flash()
        return graph_us(Comet(shape, tokens).prefill(q, key, value, batch, context, flash), 3)
    if mode == "vllm-int4":  # up to 160 ms a call
        return graph_us(VllmInt4(shape, tokens).calls(q, batch, context)[:1], repeats=3)
    if mode == "fa3-bf16-dense":
        return graph_us(_dense_prefill(q, shape, batch, context), 3)
    return graph_us(Flash3(shape, tokens, mode == "fa3-fp8").prefill(q, batch, context), 3)


def _store_us(mode: str, shape: Shape, tokens: int, copies: int = 6) -> float:
    """Storing ``tokens`` new tokens, or copying as many bytes as that reads and writes."""
    inputs = torch.randn(copies, 2, tokens, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device="cuda")
    if mode == "copy":
        stored = bytes_per_token(shape.head_dim, min(shape.group_size, shape.head_dim))
        moved = shape.kv_heads * tokens * (4 * shape.head_dim + stored)
        pairs = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in range(copies)]
        return graph_us([lambda p=p: p[0].copy_(p[1]) for p in pairs])
    cache = Comet(shape, copies * tokens)
    slots = [torch.arange(i * tokens, (i + 1) * tokens, device="cuda") for i in range(copies)]
    return graph_us([
        lambda x=x, s=s: store_kv(x[0], x[1], cache.cache, s, cache.group_size, k_offset=cache.k_offset)
        for x, s in zip(inputs, slots, strict=True)
    ])  # fmt: skip


def _cells(models: list[str], phases: list[str], quick: bool) -> list[tuple[str, str, int, int]]:
    grid = {"decode": DECODE, "prefill": PREFILL, "chunk": CHUNKS, "store": [(STORE, 0)]}
    if quick:
        grid["decode"] = [(batch, 1024) for batch in dict.fromkeys(b for b, _ in DECODE)]
        grid |= {"prefill": [(1, 1024)], "chunk": [(1, 2 * CHUNK)]}
    pairs = [(m, p) for m, p in itertools.product(models, phases) if p == "decode" or m not in VARIATIONS]
    return [(m, p, b, c) for m, p in pairs for b, c in grid[p]]


def _measure(model: str, phase: str, batch: int, context: int, mode: str) -> dict[str, Any]:
    """One row of the results file."""
    shape, read = MODELS[model], None
    if phase == "store":
        us = _store_us(mode, shape, batch)
    elif phase == "decode":
        us, read = _decode_row(mode, shape, batch, context)
    else:
        us = _prefill_us(mode, shape, batch, context, context if phase == "prefill" else CHUNK)
    row = {"model": model, "batch": batch, "context": context, "phase": phase, "mode": mode, "us": round(us, 2)}
    rate = "" if read is None else f" {read / us / 1e6:6.2f} TB/s"
    print(f"{model:13} {phase:8} {batch:5} × {context:<7} {mode:17} {us:9.1f} us{rate}", flush=True)
    return row if read is None else {**row, "bytes_per_s": round(read / us * 1e6)}


def _modes(model: str, phase: str, modes: list[str]) -> list[str]:
    if phase == "store":
        return ["comet-int4", "copy"]
    if model in VARIATIONS:
        return [mode for mode in modes if mode in ("fa3-bf16", "comet-int4")]
    return [mode for mode in modes if phase != "decode" or mode not in PREFILL_ONLY]


def plot(rows: list[dict[str, Any]], device: str, path: Path) -> None:
    """Decode speed over FlashAttention-3 bf16, one panel a model; without matplotlib, a message instead."""
    try:
        import matplotlib
    except ImportError:
        print(f"no plot {path}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode_rows = [r for r in rows if r["phase"] == "decode"]
    models = list(dict.fromkeys(r["model"] for r in decode_rows))
    base = {(r["model"], r["batch"], r["context"]): r["us"] for r in decode_rows if r["mode"] == "fa3-bf16"}
    figure, axes = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        for offset, mode in enumerate(("comet-int4", "fa3-fp8", "vllm-int4")):
            mine = [r for r in decode_rows if (r["model"], r["mode"]) == (model, mode)]
            cells = {(r["batch"], r["context"]): r["us"] for r in mine}
            ratio = [base.get((model, *cell), 0) / cells[cell] if cell in cells else 0 for cell in DECODE]
            axis.bar([x + 0.27 * offset for x in range(len(DECODE))], ratio, 0.27, label=mode)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{model} {tuple(MODELS[model])}", fontsize=9)
        axis.set_xticks([x + 0.27 for x in range(len(DECODE))], [f"{b}×{c // 1024}k" for b, c in DECODE], rotation=60)
    axes[0][0].set_ylabel("decode, speed over FlashAttention-3 bf16")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(device, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    modes = ["fa3-bf16", "comet-int4", "fa3-fp8", "vllm-int4", *PREFILL_ONLY]
    phases = ["decode", "prefill", "chunk", "store"]
    parser = argparse.ArgumentParser(prog="comet-bench attention", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--phases", nargs="+", choices=phases, default=phases)
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--quick", action="store_true", help="short contexts: compiles every kernel, measures nothing")
    parser.add_argument("--out", type=Path, help="default: examples/results/attention-<gpu>.json")
    parser.add_argument("--append", action="store_true", help="add to the rows of an existing --out")
    parser.add_argument("--plot-only", action="store_true", help="draw the plot of an existing --out")
    args = parser.parse_args(argv)
    if args.plot_only:
        recorded = json.loads(args.out.read_text())
        plot(recorded["rows"], recorded["device"], args.out.with_suffix(".png"))
        return 0
    device = torch.cuda.get_device_name().lower().replace(" ", "-")
    gc.freeze()  # every graph capture collects garbage: not among all that vLLM imports
    out = args.out or Path("examples/results") / f"attention-{device}.json"
    rows = json.loads(out.read_text())["rows"] if args.append else []
    env = environment()
    for model, phase, batch, context in _cells(args.models, args.phases, args.quick):
        for mode in _modes(model, phase, args.modes):
            try:
                rows.append(_measure(model, phase, batch, context, mode))
            except ImportError as error:
                print(f"{mode} left out: {error}", flush=True)
            torch.cuda.empty_cache()
        write_results(out, rows, env)  # an interrupted run keeps what it has
    if any(row["mode"] == "fa3-bf16" and row["phase"] == "decode" for row in rows):
        plot(rows, env["device"], out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
