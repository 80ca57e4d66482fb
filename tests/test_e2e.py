# SPDX-License-Identifier: Apache-2.0
"""Real vLLM serving COMET checkpoints, against a plain-torch model built from the same references.

Engines run in float32 where the test asks for agreement: rounding is then far below one activation or KV code, so what
differs is a bug. Every engine lives in a process of its own.
"""

import math
import re

import engine
import pytest
import tiny
import torch
from calibrate_tiny import ROPES, VOCAB, save_tiny, write_text
from safetensors.torch import load_file

from calibrate.__main__ import main as calibrate
from calibrate.simulate import CometLinear, load_comet
from vllm_comet import checkpoint as ck

pytestmark = pytest.mark.e2e
PROMPTS = [[(7 * i + 3 * n) % 500 + 3 for i in range(n)] for n in (5, 40, 150, 1, 64)]
TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # A seed whose greedy choices are clear enough to survive the other scales of two ranks.
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model", seed=240)


@pytest.fixture(scope="module")
def served(checkpoint):
    """The plain run that others are compared with; its second step repeats the first one's prompts."""
    return engine.run(checkpoint, [PROMPTS, PROMPTS[:3]], TOKENS, enable_prefix_caching=True, block_size=32)


def assert_agrees_with_torch(run, model, exact=1e-5, worst=0.25, prompts=PROMPTS):
    """Top-5 log-probabilities of the first step equal those of the torch ``model`` fed with the same tokens.

    A rounding difference that crosses the border between two codes shows in all later positions of its prompt; prompts
    without one agree to rounding. So a quarter of all positions must agree within ``exact``, and all within ``worst``.
    """
    errors = []
    for prompt, output in zip(prompts, run.outputs[0], strict=True):
        ids = torch.tensor([prompt + output["tokens"]])
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert len(output["logprobs"]) == len(logprobs)
        for expect, found in zip(logprobs, output["logprobs"], strict=True):
            errors += [abs(float(expect[int(token)]) - value) for token, value in found.items()]
    errors = torch.tensor(errors)
    quarter, largest = float(errors.quantile(0.25)), float(errors.max())
    assert quarter < exact and largest < worst


class RowParallelReference(torch.nn.Module):
    """A row-parallel layer as ``ranks`` ranks compute it: each quantises its slice of x with scales of its own."""

    def __init__(self, tensors, group_size, ranks):
        super().__init__()
        k = tensors[ck.WEIGHT_PACKED].shape[1] * 8
        self.width = k // ranks
        self.parts = torch.nn.ModuleList()
        for rank in range(ranks):
            part = {
                ck.WEIGHT_PACKED: tensors[ck.WEIGHT_PACKED].chunk(ranks, 1)[rank],
                ck.WEIGHT_SCALE: tensors[ck.WEIGHT_SCALE],
                ck.WEIGHT_GROUP_SCALE: tensors[ck.WEIGHT_GROUP_SCALE].chunk(ranks, 1)[rank],
                ck.ACT_BITS_NAME: tensors[ck.ACT_BITS_NAME].chunk(ranks)[rank],
            }
            if ck.INPUT_PERM in tensors:
                part[ck.INPUT_PERM] = tensors[ck.INPUT_PERM].chunk(ranks)[rank] - rank * self.width
            self.parts.append(CometLinear(part, None, group_size, "int8"))

    def forward(self, x):
        return sum(part(piece) for part, piece in zip(self.parts, x.split(self.width, -1), strict=True))


def load_sharded(checkpoint, ranks):
    """The torch model with the arithmetic of ``ranks`` tensor-parallel ranks."""
    model, tensors = load_comet(checkpoint), load_file(checkpoint / "model.safetensors")
    for name, _ in list(model.named_modules()):
        if name.endswith(("o_proj", "down_proj")):
            stored = {s: tensors[f"{name}.{s}"] for s in ck.COMET_SUFFIXES if f"{name}.{s}" in tensors}
            model.set_submodule(name, RowParallelReference(stored, 64, ranks))
    return model


def assert_same(run, other, step=0, other_step=0, tolerance=1e-3):
    """Same tokens, and log-probabilities within ``tolerance``."""
    for a, b in zip(run.outputs[step], other.outputs[other_step], strict=True):
        assert a["tokens"] == b["tokens"]
        for x, y in zip(a["logprobs"], b["logprobs"], strict=True):
            for token in set(x) & set(y):
                assert math.isclose(x[token], y[token], abs_tol=tolerance)


def test_served_logits_agree_with_the_torch_model(served, checkpoint):
    assert_agrees_with_torch(served, load_comet(checkpoint))
    assert "quantization=comet" in served.log, "the checkpoint names its method"


def test_vllm_counts_the_4_bit_tokens(served):
    """64 MiB hold 65,536 bf16 tokens of this model (2 layers of 2 heads at 256 bytes); 4 bits take 72 of the 256."""
    (tokens,) = {int(n.replace(",", "")) for n in re.findall(r"KV cache size: ([\d,]+) tokens", served.log)}
    assert 3.55 * 65536 < tokens <= 256 / 72 * 65536
    assert "3.56x less than 16 bits" in served.log


def test_prefix_hits_give_the_same_tokens(served):
    assert [output["cached"] for output in served.outputs[1]] == [0, 32, 128]
    short = engine.EngineRun([served.outputs[0][:3]], 0, "", 0)
    assert_same(served, short, step=1)


def test_chunked_prefill_gives_the_same_tokens(served, checkpoint):
    run = engine.run(checkpoint, [PROMPTS], TOKENS, enable_prefix_caching=False, max_num_batched_tokens=16)
    assert_same(run, served)


def test_preemption_gives_the_same_tokens(checkpoint, served):
    prompts = [PROMPTS[2]] * 4
    run = engine.run(checkpoint, [prompts], 40, block_size=16, enable_prefix_caching=False, max_num_seqs=4,
                     kv_cache_memory_bytes=44 * 16 * 288 * 1, max_model_len=256)
    assert run.preemptions > 0
    assert all(tokens[:TOKENS] == served.tokens()[2] for tokens in run.tokens())
    assert len({tuple(tokens) for tokens in run.tokens()}) == 1


def test_tensor_parallel_gives_the_same_tokens(served, checkpoint):
    """Two ranks quantise their halves of a row-parallel input with scales of their own: close to one rank, and equal
    to a torch model that does the same."""
    run = engine.run(checkpoint, [PROMPTS], TOKENS, tensor_parallel_size=2)
    assert run.tokens() == served.tokens()
    assert_agrees_with_torch(run, load_sharded(checkpoint, 2))


def test_mixed_activations_from_additional_config(checkpoint):
    run = engine.run(checkpoint, [PROMPTS], TOKENS, additional_config={"comet": {"activations": "mixed"}})
    assert_agrees_with_torch(run, load_comet(checkpoint, "mixed"), worst=0.6)  # a 4-bit code weighs more


def test_explicit_kv_cache_dtype_wins(checkpoint):
    run = engine.run(checkpoint, [PROMPTS], TOKENS, dtype="bfloat16", kv_cache_dtype="bfloat16")
    assert "COMET 4-bit KV cache is off: --kv-cache-dtype bfloat16 was given" in run.log
    assert "KV cache size: 65,536 tokens" in run.log
    assert_agrees_with_torch(run, load_comet(checkpoint, kv4=False), exact=0.03, worst=0.5)


def test_compiled_bfloat16_engine(checkpoint):
    """What `vllm serve` does by default."""
    run = engine.run(checkpoint, [PROMPTS], TOKENS, dtype="bfloat16", enforce_eager=False)
    assert_agrees_with_torch(run, load_comet(checkpoint), exact=0.03, worst=0.5)


@pytest.mark.parametrize("group_size", [128, -1])
def test_other_weight_formats(tmp_path, group_size):
    """A hidden size of 320 has a short last block; group size -1 has no group scales; older ones have no K offset."""
    model = tiny.write(tmp_path / "model", group_size, kv_group_size=32, slices=1, hidden_size=320,
                       k_offset=group_size == 128)
    run = engine.run(model, [PROMPTS], TOKENS)
    assert_agrees_with_torch(run, load_comet(model))
    assert ("4-bit KV cache has no offset for K" in run.log) == (group_size == -1)


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3", "Gemma3", *ROPES])
def test_calibrated_families(tmp_path, name):
    """Calibrate and serve: sliding window (Mistral); biases of q, k and v (Qwen2); q and k norms (Qwen3); these, a
    sliding window and four norms (Gemma-3); fused projections, a rotary embedding of a part of the head and with
    factors (Phi-4-mini); scaled frequencies (Llama-3.1)."""
    # vLLM takes the head size of Qwen2 from hidden_size / heads.
    family, changes = ROPES.get(name, (name, {"hidden_size": 128}))
    base = save_tiny(tmp_path / "base", family, **changes)
    text = write_text(tmp_path / "text.txt")
    model = tmp_path / "comet"
    assert calibrate([str(base), "--out", str(model), "--data", str(text), "--length", "64", "--samples", "8"]) == 0
    prompts = [[token % VOCAB for token in prompt] for prompt in PROMPTS]
    run = engine.run(model, [prompts], TOKENS, max_model_len=256)
    assert "COMET 4-bit KV cache: " in run.log
    assert_agrees_with_torch(run, load_comet(model), prompts=prompts)


# ------------------------------------------------------------------------------------------ what must fail, and how
def damage(model):
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-5000] ^= 1
    (model / "model.safetensors").write_bytes(data)
    return {}, r"model\.\S+ in \S+ is damaged: CRC-32 \w+, expected \w+"


def newer_version(model):
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"version": 1', '"version": 99'))
    return {}, "version is 99; this vllm-comet reads version 1"


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-70000])
    return {}, "model.safetensors is truncated"


def drop_tensor(model):
    """Found while loading, as in a checkpoint that was not verified first."""
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight_scale"]
    ck.save_shard(tensors, model / "model.safetensors")
    return {"VLLM_COMET_VERIFY": "0"}, r"model.layers.1.self_attn.qkv_proj.weight_scale is missing .*2 of 3 fused parts"


def other_shape(model):
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"intermediate_size": 512', '"intermediate_size": 640'))
    return {}, r"mlp.\w+.\w+: a tensor of shape \[.* does not fit the model's"


@pytest.mark.parametrize("spoil", [damage, newer_version, truncate, drop_tensor, other_shape])
def test_a_spoiled_checkpoint_never_serves(tmp_path, spoil):
    model = tiny.write(tmp_path / "model")
    env, message = spoil(model)
    run = engine.run(model, [PROMPTS], TOKENS, env=env, check=False)
    assert run.returncode != 0 and not run.outputs
    assert re.search(message, run.log), run.log[-4000:]
