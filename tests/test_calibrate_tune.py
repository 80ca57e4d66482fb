# SPDX-License-Identifier: Apache-2.0
"""Tuning: its layers compute what the served ones compute, its gradients are right, and it lowers the divergence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from calibrate_tiny import save_tiny, write_text
from safetensors.torch import load_file

from calibrate.__main__ import main
from calibrate.data import load_text, token_windows
from calibrate.errors import CalibrationError
from calibrate.loading import ModelSource
from calibrate.pipeline import Options, calibrate
from calibrate.simulate import CometLinear, load_base, load_comet, read_tensors
from calibrate.tune import TunableLinear, TuneOptions, head_divergence, load_tunable, save_tuned, tune, tune_checkpoint
from vllm_comet.checkpoint import verify_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of each family's model, its checkpoint, and calibration windows, made once."""
    made = {}

    def make(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source = ModelSource(save_tiny(folder / "base", family))
            text = write_text(folder / "text.txt")
            calibrate(source, folder / "comet", Options(data=text, length=64, samples=16))
            windows = token_windows(load_text(text, source.tokenizer()), source.tokenizer(), None, 64, 0, 64)
            made[family] = source.directory, folder / "comet", windows
        return made[family]

    return make


@pytest.mark.parametrize("activations", ["int8", "mixed"])
def test_tunable_linear_computes_what_the_served_linear_computes(runs, activations):
    x = torch.randn(40, 192, generator=torch.Generator().manual_seed(0)) * 3
    for name, stored in read_tensors(runs("Llama")[1])[1].items():
        tunable = TunableLinear(stored, None, group_size=64)
        tunable.low_bits = {"int8": 8, "mixed": 4}[activations]
        rows = x.repeat(1, 2)[:, : tunable.codes.shape[1]]
        expected = CometLinear(stored, None, 64, activations)(rows)
        bound = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(tunable(rows), expected, rtol=1e-5, atol=bound, msg=name)


def test_untouched_model_is_stored_as_it_was(runs, tmp_path):
    _, comet, _ = runs("Phi3")
    copy = shutil.copytree(comet, tmp_path / "copy")
    save_tuned(load_tunable(copy), copy)
    for before, after in zip(comet.glob("*.safetensors"), copy.glob("*.safetensors"), strict=True):
        assert before.read_bytes() == after.read_bytes()


def test_gradient_of_the_divergence():
    draw = torch.Generator().manual_seed(1)
    hidden, target = torch.randn(2, 2, 5, 8, generator=draw).unbind()
    head = torch.nn.Linear(8, 30, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(30, 8, generator=draw))
    loss, gradient = head_divergence(hidden, target, head, head)
    leaf = hidden.clone().requires_grad_(True)
    wanted, found = head(target).softmax(-1), head(leaf).log_softmax(-1)
    expected = (wanted * (wanted.log() - found)).sum(-1).mean()
    torch.testing.assert_close(torch.tensor(loss), expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3"])
def test_tuning_lowers_the_divergence(runs, tmp_path, family):
    base, comet, windows = runs(family)
    tuned = shutil.copytree(comet, tmp_path / "tuned")
    tune_checkpoint(base, tuned, windows, TuneOptions(steps=40, tokens=512, mixed_share=1.0), CPU)
    verify_checkpoint(tuned)

    def divergence(directory):
        with torch.no_grad():
            found, wanted = (m(windows[:16]).logits.log_softmax(-1)
                             for m in (load_comet(directory, "mixed"), load_base(base)))
        return float(F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean())

    assert divergence(tuned) < 0.95 * divergence(comet)


def test_tuning_refuses_a_model_that_is_not_finite(runs):
    base, comet, windows = runs("Llama")
    student = load_tunable(comet)
    with torch.no_grad():
        student.model.norm.weight[0] = torch.nan
    with pytest.raises(CalibrationError, match="--tune: the loss is nan at step 0"):
        tune(student, load_base(base), windows, TuneOptions(steps=1, tokens=64))


def test_command_line_rotates_and_tunes(runs, tmp_path):
    base, _, _ = runs("Llama")
    text = write_text(tmp_path / "text.txt")
    common = [str(base), "--data", str(text), "--samples", "4", "--length", "64", "--rotate", "all"]
    assert main([*common, "--out", str(tmp_path / "plain")]) == 0
    assert main([*common, "--out", str(tmp_path / "tuned"), "--tune", "2"]) == 0
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert config["quantization_config"]["producer"]["tune"] == 2
    plain, tuned = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "tuned"))
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, tuned[name])}
    assert {name for name in plain if name.endswith("weight_scale")} <= changed  # a norm's change may round away
    assert all(name.endswith(("weight_scale", "norm.weight")) for name in changed)
