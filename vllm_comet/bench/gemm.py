# SPDX-License-Identifier: Apache-2.0
"""``comet-bench gemm``: the W4Ax GEMM beside cuBLAS, FP8 and vLLM's quantised linear layers, in one run on one GPU.

Two times a row: the matrix product alone, and with the activation quantisation that its mode needs before it. Up to
M 256, both are taken from CUDA-graph replays over copies of the weight that together exceed the L2, as a model's layers
do; above, from calls that wait in a stream. Every mode's output is first compared with its own reference.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_comet.bench import problems, timing
from vllm_comet.kernels import ops
from vllm_comet.kernels.tiles import table_name

DEFAULT_M = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
BASELINE = "cublas-bf16"
FUSED = "comet-fused"


@dataclass(frozen=True)
class Candidate:
    """One mode on one problem. ``product(i)`` multiplies with weight copy i, ``with_quant(i)`` quantises x first.

    error: relative distance ‖y − reference‖ / ‖reference‖ from that mode's own reference; limit: what it may be.
    """

    mode: str
    copies: int
    product: Callable[[int], Any]
    with_quant: Callable[[int], Any]
    error: float
    limit: float


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    """‖y − reference‖ / ‖reference‖ in float32; NaN stays NaN and passes no limit."""
    return float((y.float() - reference.float()).norm() / reference.float().norm().clamp_min(1e-30))


def comet(mode: str, x: torch.Tensor, n: int, k: int, copies: int, high_share: float) -> Candidate:
    weight = problems.random_weight(n, k, problems.MODES[mode], problems.low_channels(k, high_share))
    problem = problems.make_problem(n, k, x.shape[0], weight)
    weights = problems.weight_copies(weight, copies)

    def product(i: int) -> torch.Tensor:
        return ops.w4ax_linear(problem.codes, problem.act_scales, problem.sums, weights[i], problem.weight_scale)

    def with_quant(i: int) -> torch.Tensor:
        quantized = torch.ops.vllm_comet.quantize_activation(problem.x, None, weight.split, 8)
        return ops.w4ax_linear(*quantized, weights[i], problem.weight_scale)

    return Candidate(mode, copies, product, with_quant, relative_error(product(0), problem.expected()), 0.0)


def cublas_bf16(x: torch.Tensor, weights: list[torch.Tensor]) -> Candidate:
    reference = x[:64].float() @ weights[0].float().T
    product = lambda i: torch.nn.functional.linear(x, weights[i])  # noqa: E731
    return Candidate(BASELINE, len(weights), product, product, relative_error(product(0)[:64], reference), 1e-2)


def _fused_fp8_quantize() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """vLLM's per-token FP8 quantisation kernel, if vLLM is importable."""
    try:
        from vllm._custom_ops import scaled_fp8_quant
    except ImportError:
        return None
    return functools.partial(scaled_fp8_quant, use_per_token_if_dynamic=True)


def cublas_fp8(x: torch.Tensor, weights: list[torch.Tensor]) -> Candidate:
    """Both operands in e4m3, a scale per token and per channel (``torch._scaled_mm``)."""
    fp8, top = torch.float8_e4m3fn, 448.0

    def quantize(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = t.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / top
        return (t / scale).to(fp8), scale

    packed = [quantize(w) for w in weights]
    codes, scale = quantize(x)
    quantize_x = _fused_fp8_quantize() or torch.compile(quantize, dynamic=True)

    def multiply(a: torch.Tensor, a_scale: torch.Tensor, i: int) -> torch.Tensor:
        w, w_scale = packed[i]
        return torch._scaled_mm(a, w.T, scale_a=a_scale, scale_b=w_scale.T, out_dtype=torch.bfloat16)

    reference = (codes[:64].float() * scale[:64]) @ (packed[0][0].float() * packed[0][1]).T
    error = relative_error(multiply(codes, scale, 0)[:64], reference)
    return Candidate("cublas-fp8", len(weights), lambda i: multiply(codes, scale, i),
                     lambda i: multiply(*quantize_x(x), i), error, 1e-2)


def candidates(n: int, k: int, m: int, modes: list[str], high_share: float) -> Iterator[Candidate]:
    """The modes one after the other, so that only one holds its weight copies at a time."""
    cold = m <= problems.GRAPH_MAX_M
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")

    def bf16_weights(bytes_per_weight: int) -> list[torch.Tensor]:
        copies = timing.l2_copies(n * k * bytes_per_weight) if cold else 1
        return [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]

    for mode in modes:
        if mode in problems.MODES:
            yield comet(mode, x, n, k, timing.l2_copies(n * k // 2) if cold else 1, high_share)
        elif mode == BASELINE:
            yield cublas_bf16(x, bf16_weights(2))
        elif mode == "cublas-fp8":
            yield cublas_fp8(x, bf16_weights(1))
        else:
            from vllm_comet.bench import gemm_peers

            width, make = gemm_peers.MODES[mode]
            yield make(x, n, timing.l2_copies(int(n * k * width)) if cold else 1)


def time_us(run: Callable[[int], Any], m: int, copies: int) -> float:
    if m > problems.GRAPH_MAX_M:
        return timing.stream_us(lambda: run(0), calls=5, repeats=5)
    return timing.graph_us([functools.partial(run, i) for i in range(copies)], calls=24, repeats=5)


def measure(candidate: Candidate, n: int, k: int, m: int) -> tuple[float, float]:
    """Times of the product alone and with quantisation, after the check of its output."""
    if not candidate.error <= candidate.limit:
        raise AssertionError(f"{candidate.mode} {n}x{k} M={m}: relative error {candidate.error}, "
                             f"allowed {candidate.limit}")
    alone = time_us(candidate.product, m, candidate.copies)
    same = candidate.with_quant is candidate.product
    return alone, alone if same else time_us(candidate.with_quant, m, candidate.copies)


@dataclass
class Results:
    """What was measured so far, and why which mode is missing. ``save`` writes both."""

    save: Callable[[list[dict[str, Any]], dict[str, str]], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        self.save(self.rows, self.left_out)


def phases(modes: list[str]) -> list[list[str]]:
    """Ours and cuBLAS, then vLLM's kernels, then those that are compiled when called: neither a fault nor the time of
    one of these must cost the rest."""
    own = [mode for mode in modes if mode in (BASELINE, "cublas-fp8", *problems.MODES)]
    late = [mode for mode in modes if mode.startswith("humming")]
    return [own, [mode for mode in modes if mode not in own + late], late]


def run(models: list[str], ms: list[int], modes: list[str], high_share: float, results: Results) -> None:
    """Rows of ``modes``, saved after every M, so that a run that is cut short leaves what it measured."""
    for m in ms:
        if all(mode in results.left_out for mode in modes):
            return
        rows: list[dict[str, Any]] = []
        for model, layer, n, k in layers_of(models):
            wanted = [mode for mode in modes if mode not in results.left_out]
            measured = measure_all(wanted, n, k, m, high_share, results.left_out)
            where = {"model": model, "layer": layer, "n": n, "k": k, "m": m}
            rows += [{**where, "mode": mode, "us": round(alone, 3), "us_with_quant": round(with_quant, 3)}
                     for mode, (alone, with_quant) in measured.items()]  # fmt: skip
            text = "  ".join(f"{mode} {alone:.1f}" for mode, (alone, _) in measured.items())
            print(f"{model} {layer} {n}x{k} M={m} us: {text}", flush=True)
        results.add(rows)
        torch.cuda.empty_cache()


def layers_of(models: list[str]) -> list[tuple[str, str, int, int]]:
    return [(model, layer, n, k) for model in models for layer, (n, k) in problems.MODELS[model].items()]


def measure_all(
    modes: list[str], n: int, k: int, m: int, high_share: float, left_out: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Times by mode. A peer that this machine lacks, or that is wrong, goes to ``left_out`` with the reason."""
    measured = {}
    for mode in modes:
        try:
            for candidate in candidates(n, k, m, [mode], high_share):
                measured[mode] = measure(candidate, n, k, m)
        except (RuntimeError, TypeError, AttributeError, AssertionError, ImportError, NotImplementedError) as error:
            if mode in (BASELINE, *problems.MODES):
                raise
            left_out[mode] = f"{n}x{k} M={m}: {str(error).splitlines()[0][:200]}"
            print(f"{mode} is left out from here on, {left_out[mode]}", file=sys.stderr)
    return measured


def fused_rows(models: list[str], ms: list[int], high_share: float) -> list[dict[str, Any]]:
    """Activation quantisation inside the operation before it: ``us`` is vLLM's kernel for that operation alone (bf16
    out), ``us_with_quant`` ours with the quantised output. Layers ``norm`` (residual add, RMSNorm) and ``silu_mul``."""
    from vllm_comet.bench import gemm_peers

    rows = []
    for model in models:
        shapes = problems.MODELS[model]
        for m in ms:
            for layer, k, make in (("norm", shapes["qkv"][1], gemm_peers.norms),
                                   ("silu_mul", shapes["down"][1], gemm_peers.silus)):  # fmt: skip
                pair = make(m, k, problems.low_channels(k, high_share))
                alone, fused = (timing.graph_us([function], calls=24, repeats=5) for function in pair)
                rows.append({"model": model, "layer": layer, "n": k, "k": k, "m": m, "mode": FUSED,
                             "us": round(alone, 3), "us_with_quant": round(fused, 3)})  # fmt: skip
    return rows


def warm(models: list[str], ms: list[int], modes: list[str], high_share: float, worker: str) -> None:
    """Run every ``stride``-th kernel of ours once, to fill Triton's compile cache for the run that measures."""
    index, stride = (int(part) for part in worker.split("/"))
    shapes = dict.fromkeys(shape for model in models for shape in problems.MODELS[model].values())
    jobs = [(mode, shape, m) for mode in modes if mode in problems.MODES for shape in shapes for m in ms]
    for mode, (n, k), m in jobs[index::stride]:
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        comet(mode, x, n, k, 1, high_share).with_quant(0)


def speedups(rows: list[dict[str, Any]], model: str, column: str) -> dict[str, dict[int, float]]:
    """Geometric mean over the layers of ``model`` of the speed over cuBLAS bf16, by mode and M."""
    base = {(r["layer"], r["m"]): r[column] for r in rows if r["model"] == model and r["mode"] == BASELINE}
    logs: dict[str, dict[int, list[float]]] = {}
    for r in rows:
        if r["model"] == model and (r["layer"], r["m"]) in base:
            ratio = math.log(base[r["layer"], r["m"]] / r[column])
            logs.setdefault(r["mode"], {}).setdefault(r["m"], []).append(ratio)
    return {mode: {m: math.exp(sum(v) / len(v)) for m, v in by_m.items()} for mode, by_m in logs.items()}


def print_table(rows: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(r["model"] for r in rows):
        for column, title in (("us", "product alone"), ("us_with_quant", "with activation quantisation")):
            table = speedups(rows, model, column)
            ms = sorted({m for by_m in table.values() for m in by_m})
            print(f"\n{model}: speed over cuBLAS bf16, {title}, geometric mean over layers")
            print(f"{'M':20}" + "".join(f"{m:>8}" for m in ms))
            for mode, by_m in table.items():
                print(f"{mode:20}" + "".join(f"{by_m[m]:8.2f}" if m in by_m else " " * 8 for m in ms))


def print_fused(rows: list[dict[str, Any]]) -> None:
    print("\nactivation quantisation fused with the operation before it: us alone (vLLM, bf16) -> us with quantisation")
    for r in rows:
        print(f"{r['model']} {r['layer']:9} K={r['k']:<6} M={r['m']:<5} {r['us']:8.2f} -> {r['us_with_quant']:8.2f}")


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Speed over cuBLAS against M, one panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(6 * len(models) + 2, 4.5), squeeze=False, layout="constrained")
    colours = dict(zip(dict.fromkeys(r["mode"] for r in rows if r["mode"] != BASELINE), plt.get_cmap("tab10").colors,
                       strict=False))  # fmt: skip
    for axis, model in zip(axes[0], models, strict=True):
        for mode, by_m in speedups(rows, model, "us").items():
            style, colour = "o-" if mode.startswith("comet") else ".--", colours.get(mode, "black")
            axis.plot(sorted(by_m), [by_m[m] for m in sorted(by_m)], style, label=mode, color=colour)
        axis.set(xscale="log", xlabel="M (tokens)", ylabel="speed over cuBLAS bf16", title=f"{model}, {device}", ylim=0)
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}  # a panel may lack a mode
    axes[0][-1].legend(lines.values(), lines, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="comet-bench gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(problems.MODELS), nargs="*", default=list(problems.MODELS))
    parser.add_argument("--m", type=int, nargs="*", default=list(DEFAULT_M))
    parser.add_argument("--modes", nargs="*", help="default: all that this machine can run")
    parser.add_argument("--high-share", type=float, default=problems.HIGH_SHARE,
                        help="share of channels in the second activation segment (default %(default)s)")
    parser.add_argument("--processes", type=int, default=min(14, os.cpu_count() or 1), help="compile in so many first")
    parser.add_argument("--warm-worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="results file; default examples/results/gemm-<gpu>.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU: this benchmark measures GPU kernels")
    torch.manual_seed(0)
    if args.warm_worker:
        warm(args.model, args.m, args.modes or list(problems.MODES), args.high_share, args.warm_worker)
        return 0
    modes = args.modes or [BASELINE, *problems.MODES, "cublas-fp8", *_peer_modes()]
    modes = [BASELINE, *(m for m in modes if m != BASELINE)]
    command = [sys.executable, "-m", "vllm_comet.bench", "gemm", *argv, "--warm-worker"]
    workers = [subprocess.Popen([*command, f"{i}/{args.processes}"]) for i in range(args.processes)]
    if any(worker.wait() for worker in workers):
        print("a process that compiles kernels failed; they are compiled as they are measured", file=sys.stderr)
    environment = timing.environment()
    out = args.out or Path("examples/results") / f"gemm-{table_name(environment['device'])}.json"
    results = Results(lambda rows, left_out: timing.write_results(out, rows, {**environment, "left_out": left_out}))
    own, others, late = phases(modes)
    run(args.model, args.m, own, args.high_share, results)
    run(args.model, args.m, others, args.high_share, results)
    try:
        fused = fused_rows(args.model, args.m, args.high_share)
        print_fused(fused)
        results.add(fused)
    except (ImportError, AttributeError, RuntimeError) as error:
        results.left_out[FUSED] = f"vLLM's own norm and SiLU kernels are the baseline: {error}"
    print_table(results.rows)
    run(args.model, args.m, late, args.high_share, results)
    rows = results.rows
    if late:
        print_table([row for row in rows if row["mode"] in (BASELINE, *late)])
    results.add([])
    for mode, reason in results.left_out.items():
        print(f"{mode}: left out, {reason}")
    try:
        plot(rows, out.with_suffix(".png"), environment["device"])
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return 0


def _peer_modes() -> list[str]:
    try:
        from vllm_comet.bench import gemm_peers
    except ImportError as error:
        print(f"vLLM's kernels are left out: {error}", file=sys.stderr)
        return []
    return list(gemm_peers.MODES)
