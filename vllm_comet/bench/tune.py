# SPDX-License-Identifier: Apache-2.0
"""``comet-bench tune``: measure candidate GEMM tiles on this GPU and write its tile table.

Every candidate is first run and compared with the exact result, in parallel processes that also fill Triton's compile
cache; then those that are right are timed one after the other.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vllm_comet.bench import problems, timing
from vllm_comet.kernels import tiles as tile_tables
from vllm_comet.kernels.tiles import Entry, Tile
from vllm_comet.kernels.w4ax_gemm import hopper_kernel_supported, w4ax_gemm_triton

DEFAULT_M = (1, 16, 32, 64, 128, 256, 512, 1024, 4096)


def candidates(layout: str, n: int, k: int, m: int) -> list[Tile]:
    """Tiles worth measuring for a product ``[m, k] × [n, k]ᵀ``."""
    return _hopper_candidates(n, k, m) if layout == "hopper" else _triton_candidates(n, k, m)


def _splits(n: int, k: int, m: int, block_m: int, block_n: int) -> list[int]:
    """1, and divisors of the number of K blocks that leave 4 or more blocks a slice and at most 6 programs an SM."""
    blocks, programs = k // 128, -(-n // block_n) * -(-m // block_m)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    return [s for s in range(1, 29) if s == 1 or (blocks % s == 0 and blocks // s >= 4 and programs * s <= 6 * processors)]


def _hopper_candidates(n: int, k: int, m: int) -> list[Tile]:
    if m <= 16:
        forms = [(8 if m <= 8 else 16, rows, 4, stages) for rows in (64, 128) for stages in (4, 8, 16)]
    elif m <= 32:
        forms = [(32, rows, 4, stages) for rows in (64, 128) for stages in (4, 8)]
    elif m <= 64:
        forms = [(64, 64, 4, 4), (64, 64, 4, 8), (64, 128, 4, 4), (64, 128, 8, 6)]
    elif m <= 256:
        forms = [(64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 4), (128, 128, 4, 3)]
        forms += [(256, 64, 4, 4), (256, 128, 8, 3)] if m > 128 else []
    else:
        forms = [(128, 128, 4, 3), (128, 128, 8, 5), (256, 64, 4, 3), (256, 128, 8, 3)]
        splits = (1, 2) if m < 2048 else (1,)
        return [Tile(*form[:2], split, *form[2:], group) for form in forms for group in (4, 8, 16) for split in splits]
    return [Tile(bm, bn, split, warps, stages) for bm, bn, warps, stages in forms for split in _splits(n, k, m, bm, bn)]


def _triton_candidates(n: int, k: int, m: int) -> list[Tile]:
    if m <= 256:
        block_m = max(16, min(64, 1 << (m - 1).bit_length()))
        forms = [(block_m, rows, 4, stages) for rows in (64, 128) for stages in (3, 5)]
        return [Tile(bm, bn, split, w, s) for bm, bn, w, s in forms for split in _splits(n, k, m, bm, bn)[:6]]
    return [Tile(bm, 128, 1, warps, stages) for bm, warps in ((64, 4), (128, 8)) for stages in (3, 4)]


def gemm(layout: str) -> Callable[..., torch.Tensor]:
    """The kernel that reads weights of ``layout``."""
    if layout == "triton":
        return w4ax_gemm_triton
    from vllm_comet.kernels.w4ax_gemm_hopper import w4ax_gemm_hopper

    return w4ax_gemm_hopper


def run(problem: problems.Problem, tile: Tile, weight: problems.KernelWeight | None = None) -> torch.Tensor:
    weight = weight or problem.weight
    return gemm(weight.layout)(problem.codes, problem.act_scales, weight, problem.weight_scale, None, torch.bfloat16, tile)


def check(problem: problems.Problem, expected: torch.Tensor, tile: Tile) -> str | None:
    """None if ``tile`` gives the expected bits twice, else what is wrong."""
    try:
        for _ in range(2):
            y = run(problem, tile)
            if not torch.equal(y, expected):
                return f"{int((y != expected).sum())} of {y.numel()} outputs differ"
    except Exception as error:  # noqa: BLE001 - a tile that doesn't compile or launch is a result here
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def time_us(problem: problems.Problem, tile: Tile, copies: list[problems.KernelWeight]) -> float:
    if problem.x.shape[0] > problems.GRAPH_MAX_M:
        return timing.stream_us(lambda: run(problem, tile), calls=4, repeats=3)
    return timing.graph_us([functools.partial(run, problem, tile, w) for w in copies], calls=24, repeats=3)


def _check_worker(args: argparse.Namespace) -> int:
    """Check every ``stride``-th job and print a JSON line for each."""
    torch.manual_seed(0)
    index, stride = (int(part) for part in args.check_worker.split("/"))
    jobs = [(n, k, m, tile) for n, k in args.shapes for m in args.m for tile in candidates(args.layout, n, k, m)]
    cached: tuple[object, ...] = ()
    for n, k, m, tile in jobs[index::stride]:
        if cached[:3] != (n, k, m):
            weight = problems.random_weight(n, k, args.group_size, problems.low_channels(k), args.layout)
            problem = problems.make_problem(n, k, m, weight)
            cached = (n, k, m, problem, problem.expected())
        wrong = check(cached[3], cached[4], tile)
        print(json.dumps([n, k, m, tile.to_dict(), wrong]), flush=True)
    return 0


def checked_jobs(argv: list[str], processes: int) -> dict[tuple[int, int, int], list[Tile]]:
    """Run the check workers; the tiles that are right by (n, k, m). Says on stderr which are not."""
    command = [sys.executable, "-m", "vllm_comet.bench", "tune", *argv, "--check-worker"]
    workers = [subprocess.Popen([*command, f"{i}/{processes}"], stdout=subprocess.PIPE, text=True)
               for i in range(processes)]  # fmt: skip
    right: dict[tuple[int, int, int], list[Tile]] = {}
    for worker in workers:
        output, _ = worker.communicate()
        for line in output.splitlines():
            n, k, m, tile, wrong = json.loads(line)
            if wrong is None:
                right.setdefault((n, k, m), []).append(Tile(**tile))
            else:
                print(f"dropped {n}x{k} M={m} {tile}: {wrong}", file=sys.stderr)
        if worker.returncode:
            print(f"a check worker ended with {worker.returncode}; its remaining tiles are not measured", file=sys.stderr)
    return right


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comet-bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="*", metavar="NxK",
                        default=list(problems.MODELS["llama3-8b"].values()))
    parser.add_argument("--m", type=int, nargs="*", default=list(DEFAULT_M))
    parser.add_argument("--layout", choices=["hopper", "triton"], help="kernel to tune; default: what this GPU uses")
    parser.add_argument("--group-size", type=int, choices=[128, 64, -1], default=128)
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, help="table to write; default: the package's table of this GPU")
    parser.add_argument("--log", type=Path, help="write every measurement here, JSON lines")
    parser.add_argument("--check-worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: tiles can only be measured on the GPU that will use them")
    device = torch.device("cuda", torch.cuda.current_device())
    args.layout = args.layout or ("hopper" if hopper_kernel_supported(device) else "triton")
    if args.check_worker:
        return _check_worker(args)
    name = torch.cuda.get_device_name(device)
    entries, log = [], []
    for (n, k, m), right in sorted(checked_jobs(argv, args.processes).items()):
        weight = problems.random_weight(n, k, args.group_size, problems.low_channels(k), args.layout)
        problem = problems.make_problem(n, k, m, weight)
        copies = problems.weight_copies(weight, timing.l2_copies(n * k // 2) if m <= problems.GRAPH_MAX_M else 1)
        measured = sorted(((time_us(problem, tile, copies), tile) for tile in right), key=lambda pair: pair[0])
        best, tile = measured[0]
        entries.append(Entry(n, k, m, tile))
        log += [{"n": n, "k": k, "m": m, "us": us, "tile": t.to_dict()} for us, t in measured]
        nexts = "  ".join(f"{us:.1f} {t.block_m}x{t.block_n}/{t.split} w{t.warps} s{t.stages} g{t.group_n}" for us, t in measured[1:4])
        print(f"{n}x{k} M={m}: {best:.2f} us {tile}  next: {nexts}", flush=True)
    tile_tables.save_table(args.out or tile_tables.TABLES / f"{tile_tables.table_name(name)}.json", name, args.layout, entries)
    if args.log:
        args.log.write_text("".join(json.dumps(row) + "\n" for row in log))
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)
