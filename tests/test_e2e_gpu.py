# SPDX-License-Identifier: Apache-2.0
"""Real vLLM on a GPU, with everything that is on by default: torch.compile, the fusion pass, CUDA graphs, the W4Ax GEMM
and 4-bit pages; against the plain-torch model of the same references."""

import re

import engine
import pytest
import tiny
import torch

from calibrate.simulate import load_comet

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]
PROMPTS = [[(7 * i + 3 * n) % 500 + 3 for i in range(n)] for n in (5, 40, 150, 1, 64, 300)]
TOKENS = 8
SHAPE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 128}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model", group_size=128, kv_group_size=128, **SHAPE)


@pytest.fixture(scope="module")
def served(checkpoint):
    """Cold prompts, the same again from the prefix cache, and mixed batches of chunks of at most 128 tokens."""
    return engine.run(
        checkpoint, [PROMPTS, PROMPTS[:3]], TOKENS, dtype="bfloat16", enforce_eager=False, max_num_batched_tokens=128,
        enable_prefix_caching=True, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.05,
        jit_monitor_verbose=True, compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]})


def test_logprobs_agree_with_the_torch_model(served, checkpoint):
    """To bf16's rounding, but where it moves a code of K: this model's random attention is sharp, and one code of a
    token that it looks at changes a position by several nats, the same in eager mode and in any batch."""
    model = load_comet(checkpoint)
    errors = []
    for prompt, output in zip(PROMPTS, served.outputs[0], strict=True):
        logprobs = model(torch.tensor([prompt + output["tokens"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for expect, found in zip(logprobs, output["logprobs"], strict=True):
            errors += [abs(float(expect[int(token)]) - value) for token, value in found.items()]
    assert torch.tensor(errors).median() < 0.03
    assert torch.tensor(errors).quantile(0.85) < 0.3


def test_prefix_hits_give_the_cold_run_to_rounding(served):
    for cold, warm in zip(served.outputs[0], served.outputs[1], strict=False):
        first, again = cold["logprobs"][0], warm["logprobs"][0]
        common = set(first) & set(again)
        assert len(common) >= 3
        assert max(abs(first[token] - again[token]) for token in common) < 0.3
    assert any(output["cached"] for output in served.outputs[1])


def test_everything_that_makes_it_fast_was_on(served):
    fused = re.findall(r"of (\d+) activation quantisations in a graph, (\d+) joined a norm and (\d+) SiLU", served.log)
    assert ("4", "2", "1") in fused, fused  # o_proj's input comes from attention and keeps its own kernel
    assert re.search(r"COMET prefill: FlashAttention", served.log)
    assert "Capturing CUDA graphs" in served.log
    assert not re.findall(r"\S+ during inference: .*", served.log), "a kernel was compiled after start-up"
