# SPDX-License-Identifier: Apache-2.0
"""``comet-bench tune``: measure candidate GEMM tiles on this GPU and write its tile table.

Every candidate is first run and compared with the exact result, in parallel processes that also fill Triton's compile
cache; then those that are right are timed one after the other. Entries of other products in the table stay.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vllm_comet.bench import problems, timing
from vllm_comet.kernels import ops
from vllm_comet.kernels import tiles as tile_tables
from vllm_comet.kernels.act_quant import written_sums
from vllm_comet.kernels.tiles import Entry, Tile
from vllm_comet.kernels.w4ax_gemm import hopper_kernel_supported

DEFAULT_GROUP_SIZE = 128
DEFAULT_M = (8, 16, 32, 64, 128, 256, 512, 1024, 4096)


def candidates(layout: str, n: int, k: int, m: int) -> list[Tile]:
    """Tiles worth measuring for a product ``[m, k] × [n, k]ᵀ``."""
    return _hopper_candidates(n, k, m) if layout == "hopper" else _triton_candidates(n, k, m)


def _splits(n: int, k: int, m: int, block_m: int, block_n: int, blocks: int, waves: tuple[float, ...]) -> list[int]:
    """Cuts of K that give each multiprocessor so many programs, of at least ``blocks`` K blocks each; or none."""
    programs = -(-n // block_n) * -(-m // block_m)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    most = max(1, -(-k // 128) // blocks)
    return sorted({max(1, min(most, round(processors * w / programs))) for w in waves})


def _small_candidates(m: int) -> list[Tile]:
    """Tiles of Hopper's kernel for few tokens, with the stages that leave room for three programs, two, or one."""
    block_m = max(8, 1 << (m - 1).bit_length())
    tiles = []
    for rows, warps in [(16, 8), (32, 8), (32, 16)] if m <= 32 else [(32, 8)]:
        stage = warps // (rows // 16) * (block_m * 128 + rows * 66)
        sums = 8 * warps * 16 * block_m
        fits = {min(8, (room - sums) // stage) for room in (72_000, 110_000, 220_000)}
        tiles += [Tile(block_m, rows, 1, warps, stages, form="small") for stages in sorted(fits) if stages > 1]
    return tiles


FORMS: dict[int, list[tuple[int, ...]]] = {
    32: [(32, 64, 4, 4, 4, 128, 0), (32, 128, 8, 4, 4, 128, 0)],
    64: [(64, 64, 4, 3, 4, 168, 0), (64, 64, 4, 2, 4, 168, 0), (64, 64, 4, 3, 4, 168, 2), (64, 64, 4, 3, 2, 128, 0),
         (32, 64, 4, 4, 4, 128, 0), (64, 128, 8, 4, 2, 128, 0), (64, 128, 4, 3, 4, 0, 0), (64, 128, 4, 3, 4, 0, 2)],
    128: [(64, 64, 4, 3, 4, 168, 0), (64, 64, 4, 2, 4, 168, 0), (64, 64, 4, 3, 4, 168, 2), (64, 128, 4, 3, 4, 0, 2),
          (128, 64, 4, 3, 2, 0, 0), (128, 64, 4, 3, 2, 168, 1), (128, 128, 4, 3, 2, 0, 0), (128, 128, 4, 3, 2, 0, 1),
          (128, 128, 8, 3, 4, 0, 0), (128, 128, 8, 3, 4, 0, 2)],
    256: [(64, 64, 4, 3, 4, 168, 0), (64, 128, 4, 3, 4, 0, 0), (128, 64, 4, 3, 2, 0, 0), (128, 64, 4, 3, 2, 168, 1),
          (128, 128, 4, 3, 2, 0, 0), (128, 128, 4, 3, 2, 0, 1), (128, 128, 8, 3, 4, 0, 0), (128, 128, 8, 3, 4, 0, 2),
          (256, 128, 8, 3, 2, 0, 1), (256, 128, 8, 3, 2, 0, 0)],
    512: [(128, 128, 4, 3, 2, 0, 1), (128, 128, 4, 3, 2, 0, 0), (128, 128, 8, 3, 4, 0, 0), (128, 128, 8, 2, 2, 128, 1),
          (256, 128, 8, 3, 2, 0, 1), (256, 128, 8, 3, 1, 0, 0)],
    1024: [(128, 128, 4, 2, 2, 0, 1), (128, 128, 4, 3, 2, 0, 1), (128, 128, 4, 6, 1, 0, 0),
           (128, 128, 8, 2, 2, 128, 1), (128, 128, 8, 3, 2, 128, 1), (128, 128, 8, 6, 1, 128, 0),
           (256, 128, 8, 3, 2, 0, 1), (256, 128, 8, 3, 2, 0, 0)],
}  # fmt: skip
"""Tiles of Hopper's general kernel by the M up to which they are tried: block_m, block_n, warps, stages, depth,
registers and ahead. With fewer registers, and less shared memory in stages, more of them share a multiprocessor."""


def _hopper_candidates(n: int, k: int, m: int) -> list[Tile]:
    forms = FORMS[min((limit for limit in FORMS if limit >= m), default=max(FORMS))]
    if m < 32:
        forms = [(max(8, 1 << (m - 1).bit_length()), *form[1:]) for form in forms]

    def tile(form: tuple[int, ...], split: int, group_n: int) -> Tile:
        block_m, block_n, warps, stages, depth, registers, ahead = form
        return Tile(block_m, block_n, split, warps, stages, group_n, depth, registers, ahead=ahead)

    if m > 256:
        return [tile(form, 1, group_n) for form in forms for group_n in (8, 16, 32)]
    waves = (1, 2, 4) if m <= 64 else (1, 1.5, 2, 3)
    tiles = [tile(form, split, 8) for form in forms for split in _splits(n, k, m, *form[:2], form[4], waves)]
    return tiles + (_small_candidates(m) if m <= 64 else [])


def _triton_candidates(n: int, k: int, m: int) -> list[Tile]:
    if m <= 256:
        block_m = max(16, min(64, 1 << (m - 1).bit_length()))
        forms = [(block_m, rows, 4, stages) for rows in (64, 128) for stages in (3, 5)]
        return [Tile(bm, bn, split, w, s) for bm, bn, w, s in forms for split in _splits(n, k, m, bm, bn, 4, (1, 2, 4))]
    return [Tile(bm, 128, 1, warps, stages) for bm, warps in ((64, 4), (128, 8)) for stages in (3, 4)]


def run(problem: problems.Problem, tile: Tile, weight: problems.KernelWeight | None = None) -> torch.Tensor:
    weight = weight or problem.weight
    kernel = ops.gemm_kernel(weight.layout, tile)
    sums = written_sums(problem.sums)
    return kernel(problem.codes, problem.act_scales, weight, problem.weight_scale, None, torch.bfloat16, tile, sums)


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
    jobs.sort(key=lambda job: job[3].form)  # one kernel after the other: a fault ends the process
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
            print(f"a check worker ended with {worker.returncode}: its other tiles are left out", file=sys.stderr)
    return right


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comet-bench tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=_shape, nargs="*", metavar="NxK",
                        default=list(problems.MODELS["llama3-8b"].values()))
    parser.add_argument("--m", type=int, nargs="*", default=list(DEFAULT_M))
    parser.add_argument("--layout", choices=["hopper", "triton"], help="kernel to tune; default: what this GPU uses")
    parser.add_argument("--group-size", type=int, choices=[128, 64, -1], default=DEFAULT_GROUP_SIZE,
                        help="of the weights; the tiles for another than the default %(default)s are used for it only")
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
    out = args.out or tile_tables.TABLES / f"{tile_tables.table_name(name)}.json"
    entries, log = tile_tables.existing_entries(out, args.layout), []
    for (n, k, m), right in sorted(checked_jobs(argv, args.processes).items()):
        weight = problems.random_weight(n, k, args.group_size, problems.low_channels(k), args.layout)
        problem = problems.make_problem(n, k, m, weight)
        copies = problems.weight_copies(weight, timing.l2_copies(n * k // 2) if m <= problems.GRAPH_MAX_M else 1)
        measured = sorted(((time_us(problem, tile, copies), tile) for tile in right), key=lambda pair: pair[0])
        best, tile = measured[0]
        entry = Entry(n, k, m, tile, None if args.group_size == DEFAULT_GROUP_SIZE else args.group_size)
        entries[entry.key] = entry
        tile_tables.save_table(out, name, args.layout, entries.values())
        log += [{"n": n, "k": k, "m": m, "us": us, "tile": t.to_dict()} for us, t in measured]
        others = ", ".join(f"{us:.2f}" for us, _ in measured[1:4])
        print(f"{n}x{k} M={m}: {best:.2f} us {tile}, next {others}", flush=True)
    if args.log:
        args.log.write_text("".join(json.dumps(row) + "\n" for row in log))
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)
