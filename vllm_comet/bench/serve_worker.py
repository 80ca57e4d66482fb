# SPDX-License-Identifier: Apache-2.0
"""The processes of ``comet-bench serve``: one per mode, which owns a vLLM engine and measures workloads on request.

Conversation over a pipe: the worker reports how it started, then answers every :class:`Workload` with a row, and every
:class:`Profile` with where its time goes, until it receives None. Its stdout and stderr, vLLM's log, go to a file that
the parent searches for the kernels in use.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_comet.bench.serve_modes import Profile, Request, Workload, prompts

SHORT_TOKENS = 20_000
"""A workload of at most so many tokens is measured REPEATS times, and its median run reported."""
REPEATS = 3
WARMUP_OUTPUT = 4
PROFILE_AFTER, PROFILE_SECONDS = 1.2, 0.25
"""When to begin recording decoding steps, after the prompts, and for how long."""


def main(connection: Connection, options: dict[str, Any], log: Path) -> None:
    """Serve with engine ``options``, answer the parent on ``connection``, write everything else to ``log``."""
    os.setsid()  # so that the parent can end vLLM's processes with this one
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        asyncio.run(_serve(connection, options, time.perf_counter()))
    except BaseException as error:
        traceback.print_exc()
        connection.send({"error": f"{type(error).__name__}: {error}"})


async def _serve(connection: Connection, options: dict[str, Any], started: float) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_comet.bench import serve_engine  # before vLLM forks; a spawned process imports it by its name

    extension = f"{serve_engine.__name__}.WorkerExtension"
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options, worker_extension_cls=extension))
    start_s = time.perf_counter() - started
    (report, *_) = await engine.collective_rpc("comet_bench_report")
    vocabulary = engine.model_config.get_vocab_size()
    connection.send({"start_s": round(start_s, 1), **report})
    while (workload := await asyncio.to_thread(connection.recv)) is not None:
        if isinstance(workload, Profile):
            connection.send(await profile(engine, workload, vocabulary))
            continue
        row = await measure(engine, workload, vocabulary)
        (report, *_) = await engine.collective_rpc("comet_bench_report")
        connection.send(row | {"gpu_mem_gib": round(report["reserved_bytes"] / 2**30, 2)})
    engine.shutdown()


async def measure(engine: Any, workload: Workload, vocabulary: int) -> dict[str, Any]:
    """Warm up with a part of the workload's requests and a few tokens each, then measure."""
    if workload.offline:
        part = workload.requests[: -(-len(workload.requests) // 4)]
        short = tuple(Request(0.0, r.prompt, min(r.output, WARMUP_OUTPUT)) for r in part)
        await _run(engine, Workload(workload.name, short), vocabulary, "warm-up")
    repeats = REPEATS if workload.offline and workload.tokens <= SHORT_TOKENS else 1
    runs = [await _run(engine, workload, vocabulary, str(i)) for i in range(repeats)]
    row = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return row | {"workload": workload.name, "all_seconds": [run["seconds"] for run in runs]}


async def _run(engine: Any, workload: Workload, vocabulary: int, seed: str) -> dict[str, Any]:
    tokens = prompts(workload, vocabulary, seed)
    started = time.perf_counter()
    timings = await asyncio.gather(*(
        _generate(engine, f"{workload.name}-{seed}-{i}-{started}", prompt, request, started, not workload.offline)
        for i, (prompt, request) in enumerate(zip(tokens, workload.requests, strict=True))
    ))
    seconds = time.perf_counter() - started
    outputs = sum(r.output for r in workload.requests)
    gaps = [gap for timing in timings for gap in timing["gaps"]]
    return {
        "seconds": round(seconds, 4), "requests": len(timings), "total_tok_s": round(workload.tokens / seconds, 1),
        "out_tok_s": round(outputs / seconds, 1), "ttft_ms": percentiles([t["ttft"] for t in timings]),
        "itl_ms": percentiles(gaps) if gaps else None, "preemptions": sum(t["preemptions"] for t in timings),
    }  # fmt: skip


async def _generate(
    engine: Any, request_id: str, prompt: list[int], request: Request, started: float, stream: bool
) -> dict[str, Any]:
    """One request. ``gaps``: seconds between its tokens as they arrive if streamed, else their mean in the engine."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    params = SamplingParams(temperature=0, max_tokens=request.output, ignore_eos=True, detokenize=False,
                            output_kind=kind)
    await asyncio.sleep(max(0.0, started + request.at - time.perf_counter()))
    arrivals, count = [time.perf_counter()], 0
    async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id):
        count += len(output.outputs[0].token_ids)
        arrivals.append(time.perf_counter())
    if count != request.output:
        raise RuntimeError(f"request {request_id} gave {count} of {request.output} tokens")
    stats = output.metrics
    result = {"preemptions": stats.num_preemptions}
    if stream:
        gaps = [b - a for a, b in zip(arrivals[1:], arrivals[2:], strict=False)]
        return result | {"ttft": arrivals[1] - arrivals[0], "gaps": gaps}
    gaps = [(stats.last_token_ts - stats.first_token_ts) / (count - 1)] if count > 1 else []
    return result | {"ttft": stats.first_token_latency, "gaps": gaps}


async def profile(engine: Any, wanted: Profile, vocabulary: int) -> dict[str, Any]:
    """Where the time of decoding steps goes while ``wanted.batch`` requests run, from the second of two recordings: the
    first is slow to begin."""
    workload = wanted.workload()
    tokens = prompts(workload, vocabulary, "profile")
    started = time.perf_counter()
    requests = [asyncio.create_task(_generate(engine, f"profile-{wanted.batch}-{i}", prompt, request, started, False))
                for i, (prompt, request) in enumerate(zip(tokens, workload.requests, strict=True))]
    await asyncio.sleep(PROFILE_AFTER)
    for _ in range(2):
        await engine.collective_rpc("comet_bench_profile_start")
        await asyncio.sleep(PROFILE_SECONDS)
        (found, *_) = await engine.collective_rpc("comet_bench_profile_stop")
    if any(request.done() for request in requests):
        raise RuntimeError(f"requests of {workload.name} had ended before the recording did")
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    return {"batch": wanted.batch, **found}


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds at the 50th, 90th and 99th percentile."""
    if len(seconds) == 1:
        seconds = seconds * 2
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{p}": round(1e3 * cuts[p - 1], 3) for p in (50, 90, 99)}
