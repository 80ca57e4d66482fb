# SPDX-License-Identifier: Apache-2.0
"""vLLM's asynchronous engine as something that answers one timed request, for the cost measurements."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from calibrate.evaluate.candidates import Candidate


@dataclass(frozen=True)
class Timing:
    """Seconds. ``ttft``: from the request to its first token. ``itl``: mean gap between its tokens. ``latency``: from
    the request to its last token."""

    ttft: float
    itl: float
    latency: float


class Engine(Protocol):
    async def request(self, prompt: list[int], tokens: int) -> Timing:
        """Generate exactly ``tokens`` tokens after ``prompt``."""


class VllmEngine:
    """AsyncLLM in this process, its workers in others. Token ids in, token ids out; no tokenizer, and no prefix cache:
    every request pays for its prompt."""

    def __init__(self, candidate: Candidate, max_model_len: int, arguments: dict[str, Any]):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        defaults = {"max_model_len": max_model_len, "skip_tokenizer_init": True, "enable_prefix_caching": False,
                    "seed": 0, "disable_log_stats": True}
        given = defaults | arguments | candidate.engine_arguments()
        if given.get("load_format") == "dummy":
            from vllm_comet.bench import serve_engine  # random bits for every format alike

            given["worker_extension_cls"] = f"{serve_engine.__name__}.WorkerExtension"
        args = AsyncEngineArgs(**given)
        self.runner = asyncio.Runner()  # one event loop as long as the engine lives
        self.engine = AsyncLLM.from_engine_args(args)
        self.numbers = itertools.count()

    def __enter__(self) -> VllmEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self.engine.shutdown()
        del self.engine  # its finaliser fails at the interpreter's exit
        self.runner.close()

    def run(self, coroutine: Any) -> Any:
        return self.runner.run(coroutine)

    async def request(self, prompt: list[int], tokens: int) -> Timing:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                                output_kind=RequestOutputKind.DELTA)
        begin, first, last, count = time.perf_counter(), 0.0, 0.0, 0
        async for output in self.engine.generate({"prompt_token_ids": prompt}, params, str(next(self.numbers))):
            last = time.perf_counter()
            first = first or last
            count += len(output.outputs[0].token_ids)
        if count != tokens:
            raise RuntimeError(f"vLLM gave {count} tokens where {tokens} were asked for.")
        return Timing(first - begin, (last - first) / max(1, tokens - 1), last - begin)
