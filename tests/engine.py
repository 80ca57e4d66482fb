# SPDX-License-Identifier: Apache-2.0
"""Run a real vLLM engine in a process of its own and return what it generated, its log, and its errors.

``python tests/engine.py`` reads a JSON job on stdin: model, engine options and a list of steps, each
a batch of prompts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "ENGINE-RESULT "


@dataclass
class EngineRun:
    """``outputs[step][prompt]`` = {"tokens": [...], "logprobs": [{token: logprob}, ...], "cached": int}."""

    outputs: list[list[dict[str, Any]]]
    preemptions: int
    log: str
    returncode: int

    def tokens(self, step: int = 0) -> list[list[int]]:
        return [output["tokens"] for output in self.outputs[step]]


def run(model: Path, steps: list[list[list[int]]], max_tokens: int = 8, env: dict[str, str] | None = None,
        check: bool = True, **engine: Any) -> EngineRun:
    """Greedy generation for each step's prompts (token ids). With ``check`` a failing engine fails the test."""
    defaults = {"skip_tokenizer_init": True, "max_model_len": 512, "max_num_seqs": 8, "enforce_eager": True,
                "kv_cache_memory_bytes": 64 << 20, "seed": 0, "dtype": "float32", "disable_log_stats": False}
    job = {"engine": {**defaults, **engine, "model": str(model)}, "steps": steps, "max_tokens": max_tokens}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True, timeout=600,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO", **(env or {})},
    )
    log = done.stdout + done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if check:
        assert done.returncode == 0 and results, log[-6000:]
    found = json.loads(results[0][len(MARK):]) if results else {"outputs": [], "preemptions": 0}
    return EngineRun(found["outputs"], found["preemptions"], log, done.returncode)


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(**job["engine"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], detokenize=False, ignore_eos=True, logprobs=5)
    results = []
    for prompts in job["steps"]:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        results.append([
            {
                "tokens": list(request.outputs[0].token_ids),
                "logprobs": [{str(t): lp.logprob for t, lp in step.items()} for step in request.outputs[0].logprobs],
                "cached": request.num_cached_tokens,
            }
            for request in done
        ])
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    print(MARK + json.dumps({"outputs": results, "preemptions": preemptions}), flush=True)


if __name__ == "__main__":
    main()
