# SPDX-License-Identifier: Apache-2.0
"""Several checks of serving features in one real vLLM engine, in a process of its own: ``run(model, checks, engine)``.

``python tests/features_engine.py`` reads the job as JSON on stdin. Each check takes the engine and returns facts as
JSON; the tests judge them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "FEATURES-RESULT "
SCHEMA = {"type": "object", "properties": {"side": {"enum": ["left", "right"]}, "count": {"type": "integer",
          "minimum": 0, "maximum": 99}}, "required": ["side", "count"], "additionalProperties": False}  # fmt: skip
PATTERN = "(yes|no|maybe){2}-[0-9]{3}"
CROWD = 256
PROMPT = [(11 * i) % 250 + 3 for i in range(48)]
REPEATING = [([7, 8, 9, 10, 11] * 12)[: 40 + i] for i in range(4)]
STEPS = 2000


def run(model: Path, checks: dict[str, Any], **engine: Any) -> tuple[dict[str, Any], str]:
    """Facts by check, and vLLM's log. ``checks``: name → keyword arguments."""
    defaults = {"max_model_len": 256, "enforce_eager": True, "block_size": 16, "seed": 0, "dtype": "float32",
                "kv_cache_memory_bytes": 8 << 20, "enable_prefix_caching": False, "disable_log_stats": False}
    job = {"engine": {**defaults, **engine, "model": str(model)}, "checks": checks}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True, timeout=600,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"})
    log = done.stdout + done.stderr
    results = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert done.returncode == 0 and results, log[-6000:]
    return json.loads(results[0][len(MARK):]), log


def _params(**kwargs: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**{"temperature": 0, "ignore_eos": True, "detokenize": False, **kwargs})


def _generate(llm: Any, prompts: list[list[int]], params: Any, **kwargs: Any) -> list[Any]:
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False, **kwargs)


def greedy(llm: Any, prompts: list[list[int]], max_tokens: int = 16) -> list[list[int]]:
    return [list(r.outputs[0].token_ids) for r in _generate(llm, prompts, _params(max_tokens=max_tokens))]


def samples(llm: Any) -> list[list[list[int]]]:
    """Four samples of one prompt, twice with the same seed."""
    params = _params(n=4, temperature=1.0, seed=5, max_tokens=12)
    return [[list(o.token_ids) for o in _generate(llm, [PROMPT], params)[0].outputs] for _ in range(2)]


def logprobs(llm: Any) -> dict[str, list[float]]:
    """Log-probabilities of generated tokens, as they are generated and as a prompt's."""
    (first,) = _generate(llm, [PROMPT], _params(max_tokens=12, logprobs=2))
    tokens = list(first.outputs[0].token_ids)
    (again,) = _generate(llm, [PROMPT + tokens], _params(max_tokens=1, prompt_logprobs=2))
    later = again.prompt_logprobs[len(PROMPT):]
    return {"generated": [step[t].logprob for t, step in zip(tokens, first.outputs[0].logprobs, strict=True)],
            "as_prompt": [step[t].logprob for t, step in zip(tokens, later, strict=True)]}


def structured(llm: Any) -> dict[str, str]:
    from vllm.sampling_params import StructuredOutputsParams

    def ask(**constraint: Any) -> str:
        params = _params(max_tokens=80, detokenize=True, ignore_eos=False, temperature=1.0, seed=1,
                         structured_outputs=StructuredOutputsParams(**constraint))
        return _generate(llm, [PROMPT], params)[0].outputs[0].text

    return {"json": ask(json=SCHEMA), "regex": ask(regex=PATTERN)}


def crowd(llm: Any) -> dict[str, Any]:
    """256 requests aborted while they run, then 256 others at once, which need nearly every page of the cache."""
    engine = llm.llm_engine
    prompts = [[3 + (i * 7 + j) % 250 for j in range(10)] for i in range(CROWD)]
    aborted = [engine.add_request(f"aborted-{i}", {"prompt_token_ids": p}, _params(max_tokens=200))
               for i, p in enumerate(prompts)]
    for _ in range(3):
        engine.step()
    engine.abort_request(aborted, internal=True)
    left = engine.get_num_unfinished_requests()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"run-{i}", {"prompt_token_ids": prompt}, _params(max_tokens=6))
    steps: list[int] = []
    done = _finish(engine, steps)
    return {"left": left, "steps": len(steps), "done": len(done), "alone": greedy(llm, prompts[:3], 6),
            "together": [list(done[f"run-{i}"].token_ids) for i in range(3)]}


def _finish(engine: Any, steps: list[int] | None = None) -> dict[str, Any]:
    """Step until every request is done; the first output of each by its name."""
    done = {}
    for step in range(STEPS):
        if not engine.has_unfinished_requests():
            return done
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0]
        if steps is not None:
            steps.append(step)
    raise RuntimeError(f"{engine.get_num_unfinished_requests()} requests are not done after {STEPS} steps")


def lora(llm: Any, adapter: str) -> dict[str, Any]:
    """Greedy tokens and log-probabilities with an adapter and without.

    One after the other: vLLM 0.32's CPU kernels apply an adapter to all requests of a batch, with any quantisation.
    """
    from vllm.lora.request import LoRARequest

    facts = {}
    for name, request in {"with": LoRARequest("adapter", 1, adapter), "without": None}.items():
        (done,) = _generate(llm, [PROMPT], _params(max_tokens=8, logprobs=5), lora_request=request)
        facts[name] = {"tokens": list(done.outputs[0].token_ids), "logprobs": [
            {str(t): lp.logprob for t, lp in step.items()} for step in done.outputs[0].logprobs]}
    return facts


def accepted(llm: Any) -> dict[str, Any]:
    """Greedy tokens of prompts that repeat themselves, and how many drafted tokens were accepted so far."""
    tokens = greedy(llm, REPEATING, 40)
    count = {m.name: m.value for m in llm.get_metrics() if m.name.startswith("vllm:spec_decode_num_")
             and hasattr(m, "value")}
    return {"tokens": tokens, "drafted": count.get("vllm:spec_decode_num_draft_tokens", 0),
            "accepted": count.get("vllm:spec_decode_num_accepted_tokens", 0)}


def sleep(llm: Any) -> dict[str, Any]:
    """Greedy tokens before and after a sleep that moves the weights to the host, and bytes of GPU memory it freed."""
    import torch

    before = greedy(llm, [PROMPT, *REPEATING])
    awake = torch.cuda.mem_get_info()[0]
    llm.sleep(level=1)
    freed = torch.cuda.mem_get_info()[0] - awake
    llm.wake_up()
    return {"before": before, "after": greedy(llm, [PROMPT, *REPEATING]), "freed": freed}


CHECKS = {check.__name__: check for check in (greedy, samples, logprobs, structured, crowd, lora, accepted, sleep)}


def main() -> None:
    from vllm import LLM

    job = json.load(sys.stdin)
    llm = LLM(**job["engine"])
    facts = {name: CHECKS[name](llm, **kwargs) for name, kwargs in job["checks"].items()}
    print(MARK + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
