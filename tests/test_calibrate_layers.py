# SPDX-License-Identifier: Apache-2.0
"""The staged decoder layer and the transformations that must not change what a float model computes."""

from __future__ import annotations

import pytest
import torch
from calibrate_tiny import FAMILIES, ROPES, VOCAB, save_tiny, tiny_model

from calibrate.decoder import DecoderBuilder, DecoderLayer, round_trip_kv
from calibrate.fused import split_tensors
from calibrate.kv_smooth import PairTransform, common_key, fold, smooth_k
from calibrate.loading import ModelSource
from calibrate.models import Dims, choose_tensor_parallel, family_of
from calibrate.pipeline import Options, kv_format
from calibrate.rotate import RotatedSource
from calibrate.simulate import load_base

TOKENS = torch.randint(2, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))


def build_layers(model) -> tuple[DecoderBuilder, list[DecoderLayer]]:
    builder = DecoderBuilder(model.config, family_of(model.config), torch.device("cpu"), torch.float32)
    tensors = ({name: p.clone() for name, p in layer.named_parameters()} for layer in model.model.layers)
    return builder, [builder.build(i, split_tensors(t, Dims.of(model.config))) for i, t in enumerate(tensors)]


def run_layers(builder: DecoderBuilder, layers: list[DecoderLayer], model) -> torch.Tensor:
    hidden = builder.embed(TOKENS, model.model.embed_tokens.weight)
    for layer in layers:
        hidden = layer.forward(hidden)
    return model.model.norm(hidden)


@pytest.fixture(params=FAMILIES)
def model(request):
    model = tiny_model(request.param)
    model.config.architectures = [type(model).__name__]
    return model


@pytest.mark.parametrize(("family", "changes"), [(f, {}) for f in FAMILIES] + list(ROPES.values()))
def test_stages_compute_what_hugging_face_computes(family, changes):
    model = tiny_model(family, **changes)
    model.config.architectures = [type(model).__name__]
    builder, layers = build_layers(model)
    expected = model.model(TOKENS).last_hidden_state
    torch.testing.assert_close(run_layers(builder, layers, model), expected, rtol=1e-4, atol=1e-4)


def test_folded_pair_transform_leaves_the_output_unchanged(model):
    builder, layers = build_layers(model)
    before = run_layers(builder, layers, model)
    dims = Dims.of(model.config)
    for layer in layers:
        draw = torch.Generator().manual_seed(3)
        log_scale, angle = torch.randn(2, dims.kv_heads, dims.head_dim // 2, generator=draw).unbind()
        k_before = layer.qkv(before)[1]
        fold(layer, PairTransform(log_scale, angle))
        assert not torch.allclose(layer.qkv(before)[1], k_before, rtol=0.1)
    torch.testing.assert_close(run_layers(builder, layers, model), before, rtol=1e-4, atol=1e-4)


def test_fitted_transform_lowers_the_expected_error(model):
    builder, layers = build_layers(model)
    hidden = builder.embed(TOKENS, model.model.embed_tokens.weight)
    offset, ratio = smooth_k(layers[0], layers[0].attention_input(hidden), kv_group_size=32)
    assert ratio < 0.9
    assert offset.shape == (layers[0].dims.kv_heads, layers[0].dims.head_dim) and offset.dtype == torch.float32


def test_the_offset_takes_up_a_bias_of_k():
    """Qwen2.5's K has channels that its bias makes 40 times as large as the rest; RoPE turns them slowly."""
    model = tiny_model("Qwen2")
    model.config.architectures = ["Qwen2ForCausalLM"]
    for decoder_layer in model.model.layers:
        decoder_layer.self_attn.k_proj.bias.view(2, 32)[:, 15] = 200  # the slowest pair
    builder, layers = build_layers(model)
    x = layers[0].attention_input(builder.embed(TOKENS, model.model.embed_tokens.weight))
    offset, ratio = smooth_k(layers[0], x, kv_group_size=32)
    q, k, v = layers[0].qkv(x)
    exact = layers[0].attention(q, k, v)
    stored = [layers[0].attention(q, round_trip_kv(k, 32, m), v) for m in (offset, None)]
    errors = [(out - exact).norm() / exact.norm() for out in stored]
    assert ratio < 0.01 and errors[0] < 0.1 < 0.3 < errors[1]


def test_common_key_of_slow_and_fast_channels():
    """A constant K before RoPE: found whole where RoPE hardly turns, vanishing where it turns often."""
    model = tiny_model("Llama", max_position_embeddings=512)
    model.config.architectures = ["LlamaForCausalLM"]
    builder, layers = build_layers(model)
    cos, sin = builder.rotary(torch.zeros(2, 40), 0)
    constant = torch.tensor([5.0, -7.0]).view(1, 2, 1, 1).expand(2, -1, 40, 32)
    found = common_key(layers[0], builder.apply_rotary(constant, constant, cos, sin)[1]) / constant[0, :, 0]
    radians = 1e4 ** -(torch.arange(32) % 16 / 16)  # a position
    assert (found[:, radians < 2e-4] - 1).abs().max() < 0.1
    assert found[:, radians > 0.3].abs().max() < 0.1


def test_folded_down_permutation_leaves_the_output_unchanged(model):
    builder, layers = build_layers(model)
    before = run_layers(builder, layers, model)
    order = torch.randperm(Dims.of(model.config).intermediate, generator=torch.Generator().manual_seed(4))
    for layer in layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
    torch.testing.assert_close(run_layers(builder, layers, model), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dims", "requested", "expected"), [
    (Dims(4096, 14336, 32, 8, 128, 32), None, 8),
    (Dims(4096, 14336, 32, 8, 128, 32), 2, 2),
    (Dims(576, 1536, 9, 3, 64, 30), None, 1),
    (Dims(1536, 8960, 12, 2, 128, 28), None, 2),
])
def test_tensor_parallel_choice(dims, requested, expected):
    assert choose_tensor_parallel(dims, requested) == expected


@pytest.mark.parametrize(("head_dim", "requested", "expected"), [
    (64, None, 32), (96, None, 32), (128, None, 128), (256, None, 32), (64, 64, 64), (256, 128, 128),
])
def test_kv_group_size_choice(head_dim, requested, expected):
    assert kv_format(Options(kv_group_size=requested), Dims(1024, 2048, 8, 4, head_dim, 2)).group_size == expected


def test_tensor_parallel_refusal_names_layer_and_allowed_sizes():
    with pytest.raises(ValueError, match=r"--tensor-parallel 4: .*heads don't divide by 4; allowed .*\[1\]"):
        choose_tensor_parallel(Dims(576, 1536, 9, 3, 64, 30), 4)
    with pytest.raises(ValueError, match=r"mlp.down_proj has K = 11008 .* not a multiple of 128; allowed .*\[2, 1\]"):
        choose_tensor_parallel(Dims(4096, 11008, 32, 32, 128, 32), 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rotation", ["heads", "all"])
def test_rotated_model_computes_what_the_model_computes(tmp_path, family, rotation):
    source = ModelSource(save_tiny(tmp_path / "base", family))
    if rotation == "all" and family == "Gemma3":
        with pytest.raises(ValueError, match="--rotate all: Gemma3 has norms .* use --rotate heads"):
            RotatedSource(source, rotation, seed=5)
        return
    turned = RotatedSource(source, rotation, seed=5)
    names = [name for name in turned.names if name in source.names and "norm" not in name and "bias" not in name]
    config = turned.config()
    model = load_base(source.directory)
    with torch.no_grad():
        expected = model(TOKENS).logits
        state = {name: turned.tensor(name).to(torch.float32) for name in turned.names}
        actual = type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)(TOKENS).logits
    changed = [name for name in names if not torch.equal(source.tensor(name).to(torch.float32), state[name])]
    assert len(changed) == (len(names) if rotation == "all" else 2 * config.num_hidden_layers)
    error = (actual - expected).norm() / expected.norm()
    assert error < (1e-5 if rotation == "heads" else 0.01)  # the embedding is rounded to bf16
