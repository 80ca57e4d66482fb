# SPDX-License-Identifier: Apache-2.0
"""``comet-bench serve``: whole-model serving beside every mode vLLM ships, on one GPU, with random weights.

Each mode is a vLLM engine in a process of its own. A mode that fails to start or to finish is a row with the reason. A
mode counts only if vLLM's log shows the kernels it claims; otherwise its rows carry ``fallback`` and no ratio is given.

``kv_tokens`` is what fits where an engine may use ``--gpu-memory-gib`` of the GPU, 72 by default: 0.9 of an 80 GB card,
so that the count means the same on a larger one. An engine that starts alone gets that much, and the count is vLLM's.
``--parallel N`` starts N engines at once, which saves minutes because a start is mostly single-threaded compilation,
and measures them one after another while the others idle. Each then gets just the KV memory that the workloads need,
and ``kv_tokens`` follows from what it reserved beside that (``kv_tokens_by``: ``vllm`` or ``memory``). ``--workloads``
without a name only starts the engines and counts.

``--profile BATCH ...`` records the GPU's kernels while so many requests decode, after the workloads: ``profiles`` says
where a step's time goes, see :mod:`vllm_comet.bench.serve_profile`.

``ttft_ms`` is from arrival to the first token; ``itl_ms`` is the time between tokens: of every token where requests
arrive one by one (``azure-conv@RATE``), the mean of each request where all are there at the start.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_comet.bench import serve_report, serve_worker
from vllm_comet.bench.serve_modes import (
    FIXED,
    GIB,
    GRAPHS,
    MODELS,
    MODES,
    Mode,
    Profile,
    Workload,
    engine_options,
    fixed_workload,
    kv_bytes,
    model_config,
    model_folder,
    replay_workload,
)

GRAPH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]  # up to vLLM's own largest
WORKLOAD_SECONDS = 300
STOP_SECONDS = 20
REPLAY_KV_TOKENS = 131072


class Server:
    """One mode's process, see :mod:`vllm_comet.bench.serve_worker`."""

    def __init__(self, name: str, options: dict[str, Any], log: Path) -> None:
        self.name, self.log, self.options, self.started = name, log, options, time.perf_counter()
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve_worker.main, args=(theirs, options, log), name=name)
        self.process.start()
        theirs.close()

    def receive(self, timeout: float) -> dict[str, Any]:
        """The process's next message; ``{"error": reason}`` if it died or said nothing for ``timeout`` seconds."""
        try:
            if self.connection.poll(timeout):
                return self.connection.recv()
            return {"error": f"no answer within {timeout:.0f} s"}
        except (EOFError, OSError):
            return {"error": "the process died"}

    def measure(self, workload: Workload | Profile) -> dict[str, Any]:
        try:
            self.connection.send(workload)
        except OSError:
            return {"error": "the process died"}
        return self.receive(WORKLOAD_SECONDS)

    def ask_to_stop(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def stop(self) -> None:
        """Wait until the process ends, then end it and what it started."""
        self.process.join(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: see serve_worker.main
        self.process.join()


def read_log(log: str, mode: Mode, graphs: bool) -> dict[str, Any]:
    """What vLLM's log says about an engine: what proves its kernels, what is missing, KV tokens."""
    evidence, missing = [], []
    for pattern in (*mode.kernels, *(GRAPHS if graphs else ())):
        match = re.search(pattern, log)
        if match:
            evidence.append(match[0])
        else:
            missing.append(pattern)
    tokens = re.search(r"KV cache size: ([\d,]+) tokens", log)
    return {"evidence": evidence, "fallback": f"vLLM's log lacks {missing}" if missing else None,
            "kv_tokens": int(tokens[1].replace(",", "")) if tokens else None}


def count_kv_tokens(planned: int, options: dict[str, Any], reserved: int, gib: float) -> dict[str, Any]:
    """KV tokens in ``gib`` of GPU memory: vLLM's plan if the engine was given that much, else by its memory.

    planned: tokens that vLLM planned for what it was given; reserved: all bytes its process reserved.
    """
    given = options.get("kv_cache_memory_bytes")
    if given is None:
        return {"kv_tokens": planned, "kv_tokens_by": "vllm", "gpu_memory_gib": gib}
    if not reserved:  # a CPU
        return {"kv_tokens": None, "kv_tokens_by": None, "gpu_memory_gib": None}
    tokens = int((gib * GIB - (reserved - given)) * planned / given)
    return {"kv_tokens": tokens, "kv_tokens_by": "memory", "gpu_memory_gib": gib}


def root_cause(log: str) -> str | None:
    """The first exception that vLLM logged; later ones only say that a process failed."""
    match = re.search(r"\w+(?:Error|Exception): [^\n]{1,300}", log)
    return match[0] if match else None


def jit_compilations(log: str) -> int:
    """Kernels compiled while serving, by vLLM's JIT monitor."""
    return len(re.findall(r"jit_monitor\.py\S* .* during inference", log))


class Bench:
    """The modes, workloads and engine options of one invocation, and its results."""

    def __init__(self, args: argparse.Namespace, results: serve_report.Results) -> None:
        import torch

        if args.profile and not torch.cuda.is_available():
            raise ValueError("--profile records a GPU's kernels, and there is no CUDA GPU; leave it out")
        self.args, self.results = args, results
        self.config = model_config(args.model)
        self.workloads = [fixed_workload(name) for name in args.workloads]
        if args.trace:
            self.workloads += [replay_workload(args.trace, rate, args.replay_seconds, args.max_model_len)
                               for rate in args.rates]
        self.model = args.model if args.model in MODELS else Path(args.model).name

    def options(self, name: str) -> dict[str, Any]:
        mode = MODES[name]
        folder = model_folder(f"{self.model}-{name}", mode, self.config)
        options = engine_options(mode, self.config, self.args.max_model_len, self.args.graph_sizes)
        return options | {"model": str(folder)} | self._memory(mode)

    def _memory(self, mode: Mode) -> dict[str, Any]:
        import torch

        if self.args.parallel == 1 and torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            asked = self.args.gpu_memory_gib
            if asked * GIB > total:
                raise ValueError(f"--gpu-memory-gib {asked} is more than the GPU's {total / GIB:.1f}")
            return {"gpu_memory_utilization": asked * GIB / total}
        needed = [w.tokens if w.offline else REPLAY_KV_TOKENS for w in self.workloads]
        needed += [Profile(batch).workload().tokens for batch in self.args.profile]
        tokens = max([self.args.max_model_len, *needed])
        # vLLM wants the utilisation's share of the GPU to be free at the start, also where it plans without it.
        return {"kv_cache_memory_bytes": kv_bytes(mode, self.config, tokens), "gpu_memory_utilization": 0.01}

    def run(self, names: list[str]) -> None:
        """Start the modes together, measure them in turn, stop them."""
        servers = []
        try:
            servers = [Server(name, self.options(name), self.args.logs / f"{self.model}-{name}.log") for name in names]
            started = [self._start(server) for server in servers]
            for server in (server for server, ok in zip(servers, started, strict=True) if ok):
                self._measure(server)
        finally:
            for server in servers:
                server.ask_to_stop()
            for server in servers:
                server.stop()

    def _start(self, server: Server) -> bool:
        found = server.receive(max(0.0, self.args.start_seconds - (time.perf_counter() - server.started)))
        engine: dict[str, Any] = {"model": self.model, "mode": server.name}
        if "error" in found:
            found["error"] = root_cause(server.log.read_text(errors="replace")) or found["error"]
            self.results.add_engine(engine | found)
            return False
        facts = read_log(server.log.read_text(errors="replace"), MODES[server.name], bool(self.args.graph_sizes))
        facts |= count_kv_tokens(facts["kv_tokens"], server.options, found["reserved_bytes"], self.args.gpu_memory_gib)
        memory = {"weights_gib": round(found["weights_bytes"] / GIB, 2),
                  "peak_load_gib": round(found["peak_load_bytes"] / GIB, 2),
                  "gpu_mem_gib": round(found["reserved_bytes"] / GIB, 2)}
        self.results.add_engine(engine | {"load_s": found["load_s"], "start_s": found["start_s"]} | memory | facts)
        return True

    def _measure(self, server: Server) -> None:
        for workload in self.workloads:
            before = server.log.stat().st_size
            row = server.measure(workload)
            with server.log.open(errors="replace") as log:
                log.seek(before)
                row["jit_compilations"] = jit_compilations(log.read())
            self.results.add_row({"model": self.model, "workload": workload.name, "mode": server.name} | row)
            if "error" in row:
                return
        for batch in self.args.profile:
            found = server.measure(Profile(batch))
            self.results.add_profile({"model": self.model, "mode": server.name, "batch": batch} | found)
            if "error" in found:
                return


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comet-bench serve", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama3-8b",
                        help=f"one of {', '.join(MODELS)}, or a folder with config.json (default %(default)s)")
    parser.add_argument("--modes", nargs="*", choices=list(MODES), default=list(MODES), metavar="MODE",
                        help="default: %(default)s")
    parser.add_argument("--workloads", nargs="*", default=list(FIXED), metavar="NxPROMPT-OUTPUT",
                        help="default: %(default)s")
    parser.add_argument("--trace", type=Path, help="replay requests of this CSV: TIMESTAMP, ContextTokens, "
                        "GeneratedTokens")
    parser.add_argument("--rates", type=float, nargs="*", default=[2, 4, 8, 16], help="mean requests a second")
    parser.add_argument("--replay-seconds", type=float, default=30)
    parser.add_argument("--profile", type=int, nargs="*", default=[], metavar="BATCH", help="record decoding steps of "
                        "so many requests")
    parser.add_argument("--parallel", type=int, default=1, help="engines that start together (default %(default)s)")
    parser.add_argument("--gpu-memory-gib", type=float, default=72, help="of an engine that starts alone")
    parser.add_argument("--start-seconds", type=float, default=540, help="a mode that takes longer to start has failed "
                        "(default %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--graph-sizes", type=int, nargs="*", default=GRAPH_SIZES, help="batch sizes with CUDA graphs; "
                        "none: run eagerly (default %(default)s)")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="start from these results files; what is "
                        "measured again replaces what they hold")
    parser.add_argument("--logs", type=Path, help="keep vLLM's logs in this folder")
    parser.add_argument("--out", type=Path, help="results file; default examples/results/serve-<gpu>.json")
    return parser


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    results = serve_report.Results(args.out, args.merge)
    with tempfile.TemporaryDirectory(prefix="comet-bench-") as folder:
        args.logs = args.logs or Path(folder)
        args.logs.mkdir(parents=True, exist_ok=True)
        try:
            bench = Bench(args, results)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        for first in range(0, len(args.modes), args.parallel):
            bench.run(args.modes[first : first + args.parallel])
    serve_report.print_table(results.rows, results.engines)
    try:
        serve_report.plot(results.rows, results.path.with_suffix(".png"), results.environment["device"])
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return 0 if all("error" not in found for found in results.rows + results.engines) else 1
