# SPDX-License-Identifier: Apache-2.0
"""The command line end to end on tiny models: a valid checkpoint, resume, determinism, limits and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibrate_tiny import FAMILIES, VOCAB, save_tiny, write_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibrate.__main__ import main
from calibrate.export import Workspace
from calibrate.fmpq import segments
from calibrate.simulate import CometLinear, greedy, load_comet
from vllm_comet import checkpoint as fmt
from vllm_comet.kernels.act_quant import quantize_activation_ref
from vllm_comet.kernels.w4ax_gemm import w4ax_gemm_ref

TOKENS = torch.randint(2, VOCAB - 60, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="session")
def run(tmp_path_factory, text):
    """Calibrate a tiny model (once per distinct request): ``run(family, *options) -> (model folder, checkpoint)``."""
    done: dict[tuple, tuple[Path, Path]] = {}

    def run(family: str, *options: str, **changes) -> tuple[Path, Path]:
        key = (family, options, tuple(sorted(changes.items())))
        if key not in done:
            folder = tmp_path_factory.mktemp(family)
            model = save_tiny(folder / "model", family, **changes)
            assert calibrate(model, folder / "out", text, *options) == 0
            done[key] = model, folder / "out"
        return done[key]

    return run


def calibrate(model: Path, out: Path, text: Path, *options: str) -> int:
    return main([str(model), "--out", str(out), "--data", str(text), "--samples", "8", "--length", "64", *options])


def dequantized_by_hand(tensors: dict[str, torch.Tensor], layer: str, group_size: int) -> torch.Tensor:
    """W[n, perm[j]] = c[n] · g[n, j // group_size] · (q[n, j] − 8), one nibble at a time."""
    packed = tensors[f"{layer}.weight_packed"].to(torch.int64) & 0xFFFFFFFF
    codes = torch.stack([packed >> (4 * i) & 15 for i in range(8)], dim=-1).flatten(1)
    group = torch.arange(codes.shape[1]) // group_size
    weight = (codes - 8) * tensors[f"{layer}.weight_group_scale"].to(torch.int64)[:, group]
    weight = weight.to(torch.float64) * tensors[f"{layer}.weight_scale"].to(torch.float64).unsqueeze(1)
    perm = tensors.get(f"{layer}.input_perm", torch.arange(codes.shape[1])).to(torch.int64)
    return weight[:, torch.argsort(perm)].to(torch.float32)


def fuse(state: dict[str, torch.Tensor]) -> None:
    """Phi-3's projections as its own code names them."""
    for index in range(2):
        for fused, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            block, name = f"model.layers.{index}.{fused.split('.')[0]}", f"model.layers.{index}.{fused}.weight"
            state[name] = torch.cat([state.pop(f"{block}.{part}_proj.weight") for part in parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_verifies_and_simulates_its_dequantised_weights(run, family):
    model_dir, out = run(family)
    summary = fmt.verify_checkpoint(out)
    assert len(summary.layers) == 2 * 7 and summary.int8_share <= 0.16
    assert not out.with_name("out.partial").exists()

    tensors = load_file(out / "model.safetensors")
    stored = (*fmt.COMET_SUFFIXES, fmt.K_OFFSET)
    state = {name: t for name, t in tensors.items() if name.rsplit(".", 1)[1] not in stored}
    state |= {f"{layer}.weight": dequantized_by_hand(tensors, layer, 64) for layer in summary.layers}
    expected = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if family == "Phi3":
        fuse(state)
    expected.load_state_dict(state, strict=not expected.config.tie_word_embeddings)
    with torch.no_grad():
        found = load_comet(out, "none", kv4=False)(TOKENS).logits
        torch.testing.assert_close(found, expected(TOKENS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), [(family, {}) for family in FAMILIES] + [
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
])
def test_quantised_model_stays_near_the_original(run, family, changes):
    model_dir, out = run(family, **changes)
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)(TOKENS).logits

        def similarity(activations: str, kv4: bool) -> float:
            logits = load_comet(out, activations, kv4)(TOKENS).logits
            return float(torch.cosine_similarity(logits, exact, dim=-1).mean())

        weights_only = similarity("none", False)  # random weights suffer far more from 4 bits than trained ones
        assert weights_only > 0.8
        assert abs(similarity("int8", False) - weights_only) < 0.01
        assert weights_only - similarity("int8", True) < 0.04
        assert weights_only > similarity("mixed", False) > 0.5


@pytest.mark.parametrize("activations", ["int8", "mixed"])
def test_simulated_linear_is_the_reference_bit_for_bit(run, activations):
    tensors = load_file(run("Qwen2", "--int8-share", "0.5")[1] / "model.safetensors")
    layer = "model.layers.1.self_attn.q_proj"
    stored = {suffix: tensors[f"{layer}.{suffix}"] for suffix in fmt.COMET_SUFFIXES}
    bias = tensors[f"{layer}.bias"]
    order, split = segments(stored[fmt.ACT_BITS_NAME], 192)
    assert 0 < split < 192
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(0)) * 10
    codes, scales = quantize_activation_ref(x, stored[fmt.INPUT_PERM].to(torch.int64)[order], split,
                                            8 if activations == "int8" else 4)
    weight = fmt.integer_weight(stored[fmt.WEIGHT_PACKED], stored[fmt.WEIGHT_GROUP_SCALE], 64)[:, order]
    expected = w4ax_gemm_ref(codes, scales, weight, stored[fmt.WEIGHT_SCALE], split, bias, torch.float32)
    assert torch.equal(CometLinear(stored, bias, 64, activations)(x), expected)


def test_greedy_decoding_from_the_cache_agrees_with_one_forward_pass(run):
    model = load_comet(run("Llama")[1], "int8", kv4=True)
    with torch.no_grad():
        prompt = TOKENS[0].tolist()
        tokens, logits = greedy(model, prompt, 8)
        full = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    difference = (logits - full).abs()  # order of summation moves a code now and then
    assert difference.median() < 1e-3
    assert difference.max() < 0.1
    assert tokens == full.argmax(-1).tolist()


def test_members_of_a_fused_layer_share_permutation_and_bits(run):
    tensors = load_file(run("Llama")[1] / "model.safetensors")
    for index in range(2):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            for suffix in (fmt.INPUT_PERM, fmt.ACT_BITS_NAME):
                first, *others = (tensors[f"model.layers.{index}.{member}.{suffix}"] for member in group)
                assert all(torch.equal(first, other) for other in others)
        assert f"model.layers.{index}.mlp.down_proj.{fmt.INPUT_PERM}" not in tensors


def test_tensor_parallel_slices_keep_their_channels_and_have_equal_int8_blocks(run):
    _, out = run("Llama", "--int8-share", "0.5", hidden_size=256, head_dim=64, intermediate_size=512)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["tensor_parallel"] == 2
    tensors = load_file(out / "model.safetensors")
    high = 0
    for index in range(2):
        o_proj, down = (f"model.layers.{index}.{name}" for name in ("self_attn.o_proj", "mlp.down_proj"))
        fmt.check_permutation(tensors[f"{o_proj}.{fmt.INPUT_PERM}"], 2, o_proj)
        for name in (o_proj, down):
            first, second = tensors[f"{name}.{fmt.ACT_BITS_NAME}"].chunk(2)
            assert torch.equal(first, second)
            high += int((first == 8).sum())
    assert high > 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_run_resumes_to_the_same_bytes(run, text, tmp_path, monkeypatch, capsys):
    model, whole = run("Qwen2")
    out, save_layer = tmp_path / "out", Workspace.save_layer

    def interrupt(self, index, *rest):
        if index == 1:
            raise KeyboardInterrupt
        save_layer(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "save_layer", interrupt)
        assert calibrate(model, out, text) == 130
    assert "Continue with --resume" in capsys.readouterr().err
    assert not out.exists()
    assert calibrate(model, out, text) == 1
    assert "left from an interrupted run" in capsys.readouterr().err
    assert calibrate(model, out, text, "--resume", "--seed", "1") == 1
    assert "begun with other settings: samples' tokens" in capsys.readouterr().err

    calibrated = []

    def count(self, index, *rest):
        calibrated.append(index)
        save_layer(self, index, *rest)

    monkeypatch.setattr(Workspace, "save_layer", count)
    assert calibrate(model, out, text, "--resume") == 0
    assert calibrated == [1]
    assert contents(out) == contents(whole)


def test_other_seed_gives_other_weights_and_the_same_seed_the_same(run, text, tmp_path):
    model, first = run("Qwen2")
    assert calibrate(model, tmp_path / "again", text) == 0
    assert contents(tmp_path / "again") == contents(first)
    assert calibrate(model, tmp_path / "other", text, "--seed", "1") == 0
    name = "model.safetensors"
    assert contents(tmp_path / "other")[name] != contents(first)[name]


def test_exports_tokenizer_and_no_kv_section_when_not_wanted(run, text, tmp_path):
    model, _ = run("Llama")
    assert calibrate(model, tmp_path / "out", text, "--no-kv4", "--group-size", "-1", "--int8-share", "0") == 0
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert section["kv_cache"] is None and section["group_size"] == -1
    assert fmt.verify_checkpoint(tmp_path / "out").int8_share == 0
    ids = [AutoTokenizer.from_pretrained(folder)("some text")["input_ids"] for folder in (model, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_final_report_names_size_share_and_serve_command(run, text, tmp_path, capsys):
    model, _ = run("Llama")
    assert calibrate(model, tmp_path / "out", text) == 0
    printed = capsys.readouterr().out
    for part in ("INT8 share", "bf16", f"vllm serve {tmp_path / 'out'}", "layer"):
        assert part in printed


def refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("comet-calibrate: error: ")
    return error[-1]


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_refusals_name_the_cause(text, tmp_path, capsys):
    model = save_tiny(tmp_path / "model", "Llama")
    arguments = [str(model), "--out", str(tmp_path / "out"), "--length", "64"]
    data = ["--data", str(text)]
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    (tmp_path / "text.csv").write_text("a,b")
    (tmp_path / "exists").mkdir()

    assert "empty.txt is empty" in refused(capsys, *arguments, "--data", str(tmp_path / "empty.txt"))
    assert "9 tokens: 0 samples of 64" in refused(capsys, *arguments, "--data", str(tmp_path / "short.txt"))
    assert "bad.jsonl, line 2 has none of" in refused(capsys, *arguments, "--data", str(tmp_path / "bad.jsonl"))
    assert "must be .txt or .jsonl" in refused(capsys, *arguments, "--data", str(tmp_path / "text.csv"))
    assert "No such file" in refused(capsys, *arguments, "--data", str(tmp_path / "absent.txt"))
    assert "1000 wanted" in refused(capsys, *arguments, *data, "--samples", "1000")
    assert "--length 512: the model has 256 positions" in refused(capsys, *arguments[:-1], "512", *data)
    assert "exists already" in refused(capsys, str(model), "--out", str(tmp_path / "exists"), "--length", "64", *data)
    assert "allowed: [32]" in refused(capsys, *arguments, *data, "--kv-group-size", "64")
    assert "--tensor-parallel 2" in refused(capsys, *arguments, *data, "--tensor-parallel", "2")
    assert "neither a folder" in refused(capsys, "a/b/c", *arguments[1:], *data)
    assert "absent.gguf does not exist" in refused(capsys, str(tmp_path / "absent.gguf"), *arguments[1:], *data)
    assert "no config.json" in refused(capsys, str(tmp_path / "exists"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_unfit_models_are_refused(text, tmp_path, capsys):
    other = save_tiny(tmp_path / "other", "Llama")
    edit_config(other, architectures=["PhiForCausalLM"])
    options = ["--out", str(tmp_path / "out"), "--data", str(text), "--length", "64"]
    assert "PhiForCausalLM is not supported; supported: LlamaForCausalLM" in refused(capsys, str(other), *options)

    odd = save_tiny(tmp_path / "odd", "Llama", intermediate_size=324)
    assert "mlp.down_proj has K = 324" in refused(capsys, str(odd), *options)

    broken = save_tiny(tmp_path / "broken", "Llama")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight in model.safetensors holds NaN" in refused(capsys, str(broken), *options)

    huge = save_tiny(tmp_path / "huge", "Llama")
    tensors = load_file(huge / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, huge / "model.safetensors", metadata={"format": "pt"})
    options[1] = str(tmp_path / "out2")
    assert "input of model.layers.0.self_attn.q_proj is NaN or infinite" in refused(capsys, str(huge), *options)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out2").exists()
