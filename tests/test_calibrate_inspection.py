# SPDX-License-Identifier: Apache-2.0
"""``--dry-run`` predicts what a run then writes, and ``comet-inspect`` shows what is in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from calibrate_tiny import FAMILIES, save_tiny, write_text

from calibrate.__main__ import main
from calibrate.inspection import as_text, inspect_checkpoint
from calibrate.inspection import main as inspect
from calibrate.loading import ModelSource
from calibrate.models import Dims, family_of
from calibrate.pipeline import Options, prepare
from calibrate.plan import Plan, Rates, describe
from vllm_comet import checkpoint as fmt


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text) -> Path:
    folder = tmp_path_factory.mktemp("comet")
    model = save_tiny(folder / "model", "Llama")
    assert main([str(model), "--out", str(folder / "out"), "--data", str(text), "--samples", "4", "--length", "64",
                 "--int8-share", "0.4"]) == 0
    return folder / "out"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group_size", ["64", "-1"])
def test_the_plan_knows_the_size_of_the_checkpoint(tmp_path, text, family, group_size):
    model = save_tiny(tmp_path / "model", family)
    options = Options(data=text, samples=4, length=64, group_size=int(group_size))
    plan, windows = prepare(ModelSource(model), options)
    assert plan.tokens == windows.numel() == 256
    argv = [str(model), "--data", str(text), "--samples", "4", "--length", "64", "--group-size", group_size]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert plan.checkpoint == fmt.verify_checkpoint(tmp_path / "out").num_bytes
    assert plan.kv_bytes == (2 * 2 * (32 + 8), 2 * 2 * 128)  # layers, KV heads, codes with their scales


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, text, capsys):
    model = save_tiny(tmp_path / "model", "Llama")
    assert main([str(model), "--dry-run", "--data", str(text), "--length", "64", "--host-memory", "0"]) == 0
    printed = capsys.readouterr().out
    for part in ("Llama: 2 layers", "down_proj [192, 320]: 3 activation blocks", "a rough estimate",
                 "up to 1 (2 can't be: self_attn.o_proj has K = 128", "for hidden states beyond --host-memory"):
        assert part in printed
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def large_plan(hidden: int, intermediate: int, heads: int, gpus: int = 1) -> Plan:
    """128 samples of 2048 tokens on GPUs."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                         num_key_value_heads=8, num_hidden_layers=80, architectures=["LlamaForCausalLM"])
    return Plan(Dims.of(config), family_of(config), fmt.CometFormat(64, kv_cache=fmt.KVCacheFormat(128)), 141 * 10**9,
                128 * 2048, tuple(torch.device("cuda", i) for i in range(gpus)), 24 * 2**30, 2**40)


def test_the_plan_knows_the_measured_memory():
    measured = json.loads(Path(__file__).parents[1].joinpath("examples/results/scale-nvidia-h200.json").read_text())
    plan = large_plan(4096, 14336, 32)
    assert plan.hidden_on_gpu == plan.hidden_bytes
    assert (plan.layer_bytes + plan.hidden_bytes) / 2**30 == pytest.approx(measured["rows"][0]["gpu_peak_gib"], rel=0.1)


def test_hidden_states_of_70b_go_to_the_host():
    plan = large_plan(8192, 28672, 64)
    assert plan.hidden_on_gpu == plan.spilled == 0 and plan.hidden_bytes < 20 * 2**30
    assert plan.kv_bytes == (80 * 8 * 136, 80 * 8 * 512)


def test_a_second_gpu_rounds_and_holds_hidden_states():
    alone, plan = large_plan(8192, 28672, 64), large_plan(8192, 28672, 64, gpus=2)
    first, second, host = plan.room.values()
    assert first == alone.hidden_on_gpu == 0 and 0 < second == plan.gpu_memory - plan.rounding_bytes < host
    rates = Rates(5e14, 5e13)
    assert plan.layer_seconds(rates) < alone.layer_seconds(rates)
    assert "on each of 1 more" in describe(plan, rates) and "more" not in describe(alone, rates)


def test_inspect_shows_shares_and_errors_of_every_layer(checkpoint, tmp_path, capsys):
    found = inspect_checkpoint(checkpoint)
    assert sum(found.parts.values()) == found.num_bytes
    report = json.loads((checkpoint / "comet_report.json").read_text())["layers"]
    for row, entry in zip(found.layers, report, strict=True):
        blocks = entry["down"]["int8_blocks"]
        assert row[3].int8_share == pytest.approx([0, 64, 192, 320][blocks] / 320)
        assert row[3].weight_error == entry["down"]["weight_error"]["mlp.down_proj"]
    assert inspect([str(checkpoint), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "█" in printed and "of every tensor are right" in printed and printed == as_text(found) + "\n"
    assert (tmp_path / "page.html").read_text().count("<tr><th>1<td>") == 1


def test_inspect_without_a_report_and_without_checksums(checkpoint, capsys):
    report = checkpoint / "comet_report.json"
    content = report.read_text()
    report.unlink()
    try:
        assert inspect([str(checkpoint), "--no-verify"]) == 0
    finally:
        report.write_text(content)
    printed = capsys.readouterr().out
    assert "were not compared" in printed and "output error" not in printed


def test_inspect_names_a_damaged_tensor(checkpoint, tmp_path, capsys):
    path = checkpoint / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-500] + bytes([content[-500] ^ 1]) + content[-499:])
    try:
        assert inspect([str(checkpoint)]) == 1
    finally:
        path.write_bytes(content)
    error = capsys.readouterr().err
    assert error.startswith("comet-inspect: error: ") and "is damaged" in error and error.count("\n") == 1
    assert inspect([str(tmp_path)]) == 1
