# SPDX-License-Identifier: Apache-2.0
"""``comet-bench serve``: its pieces, and one run over real engines in which a mode must fail and one must be marked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from vllm_comet import checkpoint as ck
from vllm_comet.bench import load, serve, serve_modes, serve_profile, serve_report, serve_worker
from vllm_comet.bench.serve_modes import MODELS, MODES
from vllm_comet.bench.serve_profile import Kernel


def row(mode, speed, workload="1x128-128", **extra):
    return {"model": "m", "workload": workload, "mode": mode, "total_tok_s": speed, **extra}


# ---------------------------------------- modes and workloads
def test_comet_section_is_what_the_format_reads_and_the_calibrator_writes():
    fmt = ck.CometFormat.from_dict(serve_modes.quantized_config(MODES["comet"], MODELS["llama3-8b"])
                                   ["quantization_config"])
    assert fmt.group_size == 64 and fmt.kv_cache.group_size == 128
    small = serve_modes.quantized_config(MODES["comet"], tiny.CONFIG)["quantization_config"]
    assert ck.CometFormat.from_dict(small).kv_cache.group_size == 32
    assert serve_modes.quantized_config(MODES["bf16"], tiny.CONFIG) == tiny.CONFIG


@pytest.mark.parametrize("mode, bits", [("bf16", 16), ("fp8-fp8kv", 8), ("comet", 5)])
def test_kv_memory_of_a_token(mode, bits):
    """Llama-3-8B keeps 32 layers of 8 heads of 128 channels, K and V."""
    found = serve_modes.kv_bytes(MODES[mode], MODELS["llama3-8b"], 1000)
    assert found == pytest.approx(1.03 * 5096 * 65536 * bits / 8)


def test_fixed_workloads():
    work = serve_modes.fixed_workload("64x1024-512")
    assert len(work.requests) == 64 and work.tokens == 64 * 1536 and work.offline
    with pytest.raises(ValueError, match="64-1024-512"):
        serve_modes.fixed_workload("64-1024-512")


def write_trace(path, lengths, gap=0.5):
    rows = [f"2023-11-16 18:15:{10 + i * gap:010.7f},{context},{out}" for i, (context, out) in enumerate(lengths)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return path


def test_replay_keeps_the_traces_pattern_at_the_rate_asked_for(tmp_path):
    trace = write_trace(tmp_path / "trace.csv", [(100, 10), (9000, 20), (50, 5000), (7, 0)])
    work = serve_modes.replay_workload(trace, rate=4, seconds=1, max_model_len=1024)
    assert not work.offline and work.name == "azure-conv@4"
    assert [r.at for r in work.requests] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [(r.prompt, r.output) for r in work.requests] == [(100, 10), (1004, 20), (50, 512), (7, 1)]
    with pytest.raises(ValueError, match="has 4 requests; rate 4 for 2 s needs 8"):
        serve_modes.replay_workload(trace, rate=4, seconds=2, max_model_len=1024)


def test_prompts_share_no_prefix_and_repeat_with_their_seed():
    work = serve_modes.fixed_workload("32x40-1")
    first, again, other = (serve_modes.prompts(work, 512, seed) for seed in ("0", "0", "1"))
    assert first == again and all(len(p) == 40 and set(p) <= set(range(3, 512)) for p in first)
    assert len({tuple(p[:8]) for p in first + other}) == 64


# ---------------------------------------- logs and the results
def test_a_log_without_the_kernels_is_a_fallback():
    log = ("Using MacheteLinearKernel for CompressedTensorsWNA16\nUsing FLASH_ATTN attention backend out of ...\n"
           "Using FlashAttention version 3\nCapturing CUDA graphs (PIECEWISE): 100%\rCapturing CUDA graphs (FULL): 9%\n"
           "GPU KV cache size: 517,520 tokens, Maximum ...")
    found = serve.read_log(log, MODES["w4a16"], graphs=True)
    assert found["fallback"] is None and found["kv_tokens"] == 517520 and len(found["evidence"]) == 5
    marlin = serve.read_log(log.replace("Machete", "Marlin"), MODES["w4a16"], graphs=True)
    assert "MacheteLinearKernel" in marlin["fallback"]
    assert "FULL" in serve.read_log(log.replace("(FULL)", ""), MODES["w4a16"], graphs=True)["fallback"]
    late = "WARNING 11-22 [jit_monitor.py:140] Triton kernel JIT compilation during inference: f. This causes"
    assert serve.jit_compilations(f"{log}\n{late}") == 1 and serve.jit_compilations(log) == 0


def test_kv_tokens_by_memory_equal_vllms_plan():
    """100 tokens a GiB, 6 GiB beside the KV cache: 4 GiB are left of 10."""
    gib = serve_modes.GIB
    alone = serve.count_kv_tokens(400, {"gpu_memory_utilization": 0.5}, 10 * gib, 10)
    shared = serve.count_kv_tokens(250, {"kv_cache_memory_bytes": int(2.5 * gib)}, int(8.5 * gib), 10)
    assert (alone["kv_tokens"], alone["kv_tokens_by"]) == (400, "vllm")
    assert (shared["kv_tokens"], shared["kv_tokens_by"]) == (400, "memory")


def test_ratios_leave_out_what_failed_or_fell_back():
    rows = [row("bf16", 100.0), row("comet", 250.0), row("w4a16", 300.0, fallback="lacks Machete"),
            {"model": "m", "workload": "1x128-128", "mode": "w4a8-fp8", "error": "died"}]
    assert serve_report.speedups(rows, "m") == {"1x128-128": {"bf16": 1.0, "comet": 2.5}}


def test_results_of_several_runs_merge(tmp_path):
    first = serve_report.Results(tmp_path / "a.json", [])
    counted = {"model": "m", "mode": "comet", "kv_tokens": 7, "kv_tokens_by": "vllm", "gpu_memory_gib": 72}
    first.add_engine(counted | {"fallback": None})
    first.add_row(row("comet", 1.0))
    first.add_row(row("comet", 5.0, "64x128-128"))
    second = serve_report.Results(tmp_path / "b.json", [tmp_path / "a.json"])
    second.add_engine(counted | {"kv_tokens": 6, "kv_tokens_by": "memory", "fallback": None})
    second.add_row(row("comet", 2.0))
    written = json.loads((tmp_path / "b.json").read_text())
    assert [(r["workload"], r["total_tok_s"], r["kv_tokens"]) for r in written["rows"]] == [
        ("1x128-128", 2.0, 7), ("64x128-128", 5.0, 7)]
    spoiled = json.loads((tmp_path / "a.json").read_text()) | {"device": "another GPU"}
    (tmp_path / "a.json").write_text(json.dumps(spoiled))
    with pytest.raises(ValueError, match="another GPU"):
        serve_report.Results(tmp_path / "c.json", [tmp_path / "a.json"])


def test_the_readmes_table_gives_no_ratio_to_what_ran_other_kernels(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    import tables

    results = serve_report.Results(tmp_path / "serve-x.json", [])
    for mode, speed, fallback in (("bf16", 100.0, None), ("comet", 250.0, None), ("w4a16", 300.0, "lacks Machete")):
        results.add_engine({"model": "m", "mode": mode, "kv_tokens": 1000, "gpu_memory_gib": 72,
                            "fallback": fallback})
        results.add_row(row(mode, speed))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = list(tables.serve())
    assert "| comet | 1,000 | 250 (2.50) |" in lines and "| w4a16 | ran other kernels |  |" in lines


def test_percentiles():
    assert serve_worker.percentiles([0.01]) == {"p50": 10.0, "p90": 10.0, "p99": 10.0}
    assert serve_worker.percentiles([i / 1000 for i in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


@pytest.mark.parametrize("kind", load.FORMATS)
def test_random_checkpoints_have_every_tensor_of_their_format(tmp_path, kind):
    size = load.write_checkpoint(tmp_path / kind, tiny.CONFIG, kind)
    index = json.loads((tmp_path / kind / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(index) == 3 + 2 * (2 + {"comet": 6 * 5 + 4 + 1, "w4a16": 7 * 3}[kind])
    quantised = 2 * (256 * 256 + 2 * 128 * 256 + 256 * 256 + 3 * 512 * 256) // 2
    assert quantised < size - 2 * 2 * 512 * 256 < 1.2 * quantised
    if kind == "comet":
        summary = ck.verify_checkpoint(tmp_path / kind)
        assert len(summary.layers) == 14 and 0 < summary.int8_share < 0.5


# ---------------------------------------- real engines
@pytest.mark.e2e
def test_a_run_measures_marks_and_survives_its_modes(tmp_path):
    """On a CPU: comet and bf16 serve, but not with the GPU kernels they claim; W4A8-FP8 can't start at all."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(tiny.CONFIG))
    trace = write_trace(tmp_path / "trace.csv", [(30, 5), (900, 9), (60, 7), (20, 3)], gap=0.2)
    out = tmp_path / "results.json"
    command = ["-m", "vllm_comet.bench", "serve", "--model", str(tmp_path / "model"), "--modes", "comet", "bf16",
               "w4a8-fp8", "--workloads", "1x16-8", "4x64-8", "--trace", str(trace), "--rates", "4",
               "--replay-seconds", "1", "--max-model-len", "512", "--graph-sizes", "--parallel", "3", "--out", str(out)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900,
                          env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    assert done.returncode == 1, "a mode failed" + done.stderr
    found = json.loads(out.read_text())
    engines = {engine["mode"]: engine for engine in found["engines"]}
    assert "compatible scheme" in engines["w4a8-fp8"]["error"] and "w4a8-fp8       FAILED" in done.stdout
    assert "COMET activations: auto → int8 (W4A8)" in engines["comet"]["evidence"]
    assert "FLASH_ATTN" in engines["bf16"]["fallback"] and engines["bf16"]["start_s"] > engines["bf16"]["load_s"] > 0
    rows = {(r["mode"], r["workload"]): r for r in found["rows"]}
    assert set(rows) == {(m, w) for m in ("comet", "bf16") for w in ("1x16-8", "4x64-8", "azure-conv@4")}
    fixed, replay = rows["comet", "4x64-8"], rows["comet", "azure-conv@4"]
    assert fixed["total_tok_s"] == pytest.approx(4 * 72 / fixed["seconds"], rel=1e-2)
    assert fixed["out_tok_s"] == pytest.approx(4 * 8 / fixed["seconds"], rel=1e-2)
    assert replay["requests"] == 4 and replay["seconds"] >= 1.0, "the last request arrives after a second"
    for measured in (fixed, replay):
        assert 0 < measured["ttft_ms"]["p50"] <= measured["ttft_ms"]["p99"] and measured["itl_ms"]["p50"] > 0
    assert str(tmp_path) not in found["command"]


# ---------------------------------------- profiles of decoding steps
def test_time_of_a_step_is_shared_out_without_counting_an_overlap_twice():
    kernels = [Kernel("_w4ax_kernel", 0, 10), Kernel("_rms_norm_kernel", 8, 14), Kernel("nvjet_tst_128", 20, 25),
               Kernel("void cutlass::device_kernel<flash::enable_sm90>", 25, 27), Kernel("argmax", 27, 28)] * 2
    kernels = [Kernel(k.name, k.start + 30 * (i // 5), k.end + 30 * (i // 5)) for i, k in enumerate(kernels)]
    kernels.append(Kernel("argmax", 158, 160))
    found = serve_profile.summarize(kernels, steps=2)
    assert found["step_us"] == 80.0 and found["kernels"] == 5.5 and found["steps"] == 2
    assert found["parts_us"] == {"w4ax": 10, "norms": 4, "products": 5, "attention": 2, "rest": 2, "gaps": 7,
                                 "waiting": 50}
    assert sum(found["parts_us"].values()) == found["step_us"]
    assert serve_profile.longest(kernels, 2, 1) == [{"name": "_w4ax_kernel", "us": 10.0, "launches": 1.0}]
    with pytest.raises(ValueError, match="0 kernels in 2 steps"):
        serve_profile.summarize([], 2)


@pytest.mark.parametrize("name, part", [
    ("_decode_kernel", "attention"), ("_store_kernel", "attention"), ("triton_poi_fused_add_0", "norms"),
    ("vllm::dynamic_per_token_scaled_fp8_quant_kernel", "norms"), ("machete::kernel", "products"),
    ("cutlass::device_kernel<GemmUniversal>", "products"), ("Memcpy HtoD", "rest"), ("_quantize_kernel", "norms"),
])  # fmt: skip
def test_kernels_by_name(name, part):
    assert serve_profile.part_of(name) == part
