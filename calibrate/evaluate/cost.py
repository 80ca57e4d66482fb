# SPDX-License-Identifier: Apache-2.0
"""What a query costs in the use cases of "Give Me BF16 or Give Me Death?" (arXiv 2411.02355), on the device at hand.

Synchronous: one query at a time, its latency. Asynchronous: queries arrive as a Poisson process, and the highest rate
is searched at which the 90th percentiles of time to first token (TTFT) and of a query's mean inter-token latency (ITL)
stay within their limits. A query per second for an hour at a price per hour makes queries per dollar.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from statistics import fmean, quantiles
from typing import Any

from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.serving import Engine, Timing


@dataclass(frozen=True)
class UseCase:
    """Tokens of the prompt and of the answer."""

    name: str
    prompt: int
    output: int


USE_CASES = (
    UseCase("code-completion", 256, 1024), UseCase("docstring", 768, 128), UseCase("code-fixing", 1024, 1024),
    UseCase("rag", 1024, 128), UseCase("instruction", 256, 128), UseCase("chat", 512, 256),
    UseCase("summarisation", 4096, 512),
)


@dataclass(frozen=True)
class Load:
    """How the load is made. ``ttft``, ``itl``: limits in seconds. ``queries``: synchronous ones. ``seconds``: least
    length of a trial at one rate. ``trials``: most rates that are tried. ``vocabulary``: prompts are random tokens."""

    ttft: float
    itl: float
    queries: int
    seconds: float
    trials: int
    vocabulary: int
    seed: int


GROWTH = 4.0
CLOSE_ENOUGH = 1.1
FEWEST = 8
"""The rate grows by GROWTH until a trial misses a limit, then halves the gap in ratio until that is CLOSE_ENOUGH. A
trial has at least FEWEST queries and lasts two synchronous latencies or more, so that it reaches its steady state."""


def select_use_cases(names: list[str], scale: float) -> list[UseCase]:
    """The use cases of these names with lengths times ``scale``; raises EvaluationError for an unknown name."""
    known = {case.name: case for case in USE_CASES}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise EvaluationError(f"Unknown use cases {', '.join(unknown)}; known: {', '.join(known)}.")
    chosen = [known[name] for name in names] or list(USE_CASES)
    return [UseCase(c.name, max(4, round(c.prompt * scale)), max(4, round(c.output * scale))) for c in chosen]


async def measure(engine: Engine, case: UseCase, load: Load) -> dict[str, Any]:
    """Both measurements of one use case, in seconds and queries per second, as JSON."""
    source = random.Random(f"{load.seed} {case.name}")
    await _query(engine, case, load, source)  # the first one of a shape pays for warming up
    timings = [await _query(engine, case, load, source) for _ in range(load.queries)]
    alone = {name: fmean(getattr(t, name) for t in timings) for name in ("ttft", "itl", "latency")}
    trials = await search(1 / alone["latency"], load, lambda rate: _trial(engine, case, load, rate, alone["latency"]))
    passed = [t["rate"] for t in trials if t["meets"]]
    return {"case": asdict(case), "sync": {"queries": load.queries, **alone}, "trials": trials,
            "rate": max(passed, default=None)}


async def search(
    start: float, load: Load, trial: Callable[[float], Awaitable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Trials at growing, then bisected rates from ``start``, sorted by rate. A start that misses a limit is tried at
    half the rate, and so on."""
    trials: list[dict[str, Any]] = []
    good, bad, rate = 0.0, math.inf, start
    while len(trials) < load.trials:
        trials.append(await trial(rate))
        if trials[-1]["meets"]:
            good = max(good, rate)
        else:
            bad = min(bad, rate)
        if good and bad / good < CLOSE_ENOUGH:
            break
        rate = _next_rate(good, bad)
    return sorted(trials, key=lambda t: t["rate"])


def _next_rate(good: float, bad: float) -> float:
    """``good``: highest rate that met the limits or 0. ``bad``: lowest one that did not, or infinity."""
    if not good:
        return bad / 2
    return good * GROWTH if math.isinf(bad) else math.sqrt(good * bad)


async def _trial(engine: Engine, case: UseCase, load: Load, rate: float, latency: float) -> dict[str, Any]:
    """Queries at ``rate`` per second; percentiles of their TTFT and ITL."""
    source = random.Random(f"{load.seed} {case.name} {rate:.3g}")
    count = max(FEWEST, round(rate * max(load.seconds, 2 * latency)))
    at, waits = 0.0, []
    for _ in range(count):
        waits.append(at)
        at += source.expovariate(rate)
    stretch = (count - 1) / rate / waits[-1]  # the rate that is reported is the rate that was offered
    prompts = [_prompt(case, load, source) for _ in range(count)]

    async def later(wait: float, prompt: list[int]) -> Timing:
        await asyncio.sleep(wait)
        return await engine.request(prompt, case.output)

    timings = await asyncio.gather(*(later(w * stretch, p) for w, p in zip(waits, prompts, strict=True)))
    ttft, itl = ([getattr(t, name) for t in timings] for name in ("ttft", "itl"))
    meets = _p90(ttft) <= load.ttft and _p90(itl) <= load.itl
    return {"rate": rate, "queries": count, "ttft_mean": fmean(ttft), "ttft_p90": _p90(ttft), "itl_mean": fmean(itl),
            "itl_p90": _p90(itl), "latency_mean": fmean(t.latency for t in timings), "meets": meets}


async def _query(engine: Engine, case: UseCase, load: Load, source: random.Random) -> Timing:
    return await engine.request(_prompt(case, load, source), case.output)


def _prompt(case: UseCase, load: Load, source: random.Random) -> list[int]:
    return [source.randrange(load.vocabulary) for _ in range(case.prompt)]


def _p90(values: list[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def per_dollar(queries_per_second: float, price: float) -> float:
    """Queries per dollar at ``price`` dollars an hour."""
    return queries_per_second * 3600 / price


def priced(measured: dict[str, Any], price: float) -> dict[str, Any]:
    """A measurement with its queries per dollar; ``price``: dollars an hour of all its devices."""
    rate, latency = measured["rate"], measured["sync"]["latency"]
    return measured | {"sync": measured["sync"] | {"per_dollar": per_dollar(1 / latency, price)},
                       "async": {"rate": rate, "per_dollar": None if rate is None else per_dollar(rate, price)}}
