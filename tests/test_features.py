# SPDX-License-Identifier: Apache-2.0
"""vLLM's serving features with a COMET checkpoint: sampling, log-probabilities, structured output, abort, 256 requests
at once, n-gram speculation, LoRA. (Streaming: test_serve.py; preemption, chunks, prefix hits: test_e2e.py.)"""

import json
import re

import features_engine
import pytest
import tiny
import torch
from safetensors.torch import save_file

from calibrate.simulate import load_comet

pytestmark = pytest.mark.e2e
ADAPTED = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (128, 256), "self_attn.o_proj": (256, 256),
           "mlp.gate_proj": (512, 256), "mlp.down_proj": (256, 512)}
RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = tiny.write(tmp_path_factory.mktemp("features") / "model", seed=98)  # greedy tokens survive 1e-5 of noise
    tiny.write_tokenizer(model)
    return model


@pytest.fixture(scope="module")
def facts(checkpoint):
    """One engine for 256 requests whose cache has 262 pages of 16 tokens: 2 layers of 2 heads of 72 bytes."""
    checks = {name: {} for name in ("samples", "logprobs", "structured", "crowd", "accepted")}
    found, _ = features_engine.run(checkpoint, checks, max_num_seqs=features_engine.CROWD,
                                   kv_cache_memory_bytes=262 * 16 * 288,
                                   structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True})
    return found


def test_samples_differ_and_repeat_with_their_seed(facts):
    first, again = facts["samples"]
    assert first == again and len({tuple(sample) for sample in first}) == 4


def test_logprobs_of_a_prompt_equal_those_of_its_generation(facts):
    found = facts["logprobs"]
    assert len(found["generated"]) == 12
    assert found["as_prompt"] == pytest.approx(found["generated"], abs=1e-3)


def test_structured_output_follows_its_grammar(facts):
    found = json.loads(facts["structured"]["json"])
    assert set(found) == {"side", "count"} and found["side"] in ("left", "right") and 0 <= found["count"] <= 99
    assert re.fullmatch(features_engine.PATTERN, facts["structured"]["regex"])


def test_256_requests_run_at_once_on_the_pages_of_256_aborted_ones(facts):
    crowd = facts["crowd"]
    assert crowd["left"] == 0 and crowd["done"] == features_engine.CROWD
    assert crowd["steps"] < 12, "fewer than twice the 6 tokens: nobody waited for pages that an abort did not free"
    assert crowd["together"] == crowd["alone"]


def test_speculation_gives_the_same_greedy_tokens(facts, checkpoint):
    """The drafts are verified several tokens a step, which attention treats as a prefill."""
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    found, _ = features_engine.run(checkpoint, {"accepted": {}}, speculative_config=draft)
    assert found["accepted"]["accepted"] > 20, "the prompts repeat themselves"
    assert found["accepted"]["tokens"] == facts["accepted"]["tokens"]


def write_adapter(folder):
    """A random LoRA adapter in PEFT's format, large enough to change the output, and its tensors by layer."""
    folder.mkdir()
    parts = {}
    for layer in range(tiny.CONFIG["num_hidden_layers"]):
        for name, (n, k) in ADAPTED.items():
            parts[f"model.layers.{layer}.{name}"] = torch.randn(RANK, k) / k**0.5, 0.3 * torch.randn(n, RANK)
    stored = {f"base_model.model.{name}.lora_{side}.weight": value
              for name, pair in parts.items() for side, value in zip("AB", pair, strict=True)}
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
              "target_modules": [name.split(".")[1] for name in ADAPTED]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return parts


def test_lora_adds_to_the_quantised_layers(checkpoint, tmp_path):
    adapter = write_adapter(tmp_path / "adapter")
    found, _ = features_engine.run(checkpoint, {"lora": {"adapter": str(tmp_path / "adapter")}}, enable_lora=True,
                                   max_lora_rank=8)
    model = load_comet(checkpoint)
    assert_agrees(found["lora"]["without"], model)
    for name, (a, b) in adapter.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, a=a, b=b: y + ALPHA / RANK * (inputs[0].float() @ a.T @ b.T).to(y.dtype))
    assert_agrees(found["lora"]["with"], model)
    assert found["lora"]["with"]["tokens"] != found["lora"]["without"]["tokens"], "the adapter matters"


@pytest.mark.gpu
def test_sleep_frees_the_memory_and_waking_gives_the_same_tokens(tmp_path):
    """Packed weights and the kernels' counters come back from the host; the KV cache comes back empty."""
    model = tiny.write(tmp_path / "model", kv_group_size=128, hidden_size=1024, intermediate_size=2048, head_dim=128,
                       num_attention_heads=8)
    found, _ = features_engine.run(
        model, {"sleep": {}}, skip_tokenizer_init=True, enable_sleep_mode=True, enforce_eager=False, dtype="bfloat16",
        kv_cache_memory_bytes=2 << 30, gpu_memory_utilization=0.05,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8]})
    assert found["sleep"]["after"] == found["sleep"]["before"]
    assert found["sleep"]["freed"] > 1.5 * 2**30


def assert_agrees(output, model):
    """Top-5 log-probabilities equal the torch model's, up to codes that rounding moved (see test_e2e.py)."""
    ids = torch.tensor([features_engine.PROMPT + output["tokens"]])
    logprobs = model(ids).logits[0, len(features_engine.PROMPT) - 1 : -1].log_softmax(-1)
    for expect, found in zip(logprobs, output["logprobs"], strict=True):
        for token, value in found.items():
            assert value == pytest.approx(float(expect[int(token)]), abs=0.1)
