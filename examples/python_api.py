# SPDX-License-Identifier: Apache-2.0
"""A COMET checkpoint through vLLM's Python API; nothing but the checkpoint selects the quantisation and the KV cache.

    python examples/python_api.py out/smollm2-comet
"""

import sys

from vllm import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]


def main() -> None:
    llm = LLM(
        model=sys.argv[1],
        max_model_len=2048,
        kv_cache_memory_bytes=256 << 20,
        additional_config={"comet": {"activations": "int8"}},  # or "mixed"; "auto" is the default
    )
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24)):
        print(repr(output.prompt), "→", repr(output.outputs[0].text))


if __name__ == "__main__":  # vLLM's workers import this file again
    main()
