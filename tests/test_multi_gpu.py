# SPDX-License-Identifier: Apache-2.0
"""Two GPUs: tensor and pipeline parallel against one GPU, with vLLM's own modes as the yardstick of what may differ.

Under tensor parallelism every mode with dynamic activation scales quantises each rank's slice with a scale of its own,
so greedy tokens of a random model part at near-ties. FP8 does so in the same way, bf16 only by the order of its sums.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from statistics import mean, median

import engine
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from vllm_comet import checkpoint as ck

pytestmark = [pytest.mark.e2e, pytest.mark.gpu]
SHAPE = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2,
         "head_dim": 128}
PROMPTS = [[(7 * i + 3 * n) % 500 + 3 for i in range(n)] for n in range(4, 164, 5)]
TOKENS = 16
TWO = {"tp2": {"tensor_parallel_size": 2}, "pp2": {"pipeline_parallel_size": 2}}


def dequantise(comet, folder):
    """The bf16 checkpoint of the same model."""
    folder.mkdir()
    tensors = load_file(comet / "model.safetensors")
    dense = {}
    for name, value in tensors.items():
        layer, suffix = name.rsplit(".", 1)
        if suffix == ck.WEIGHT_PACKED:
            parts = {s: tensors.get(f"{layer}.{s}") for s in ck.COMET_SUFFIXES}
            weight = ck.integer_weight(value, parts[ck.WEIGHT_GROUP_SCALE], 64) * parts[ck.WEIGHT_SCALE][:, None]
            perm = parts[ck.INPUT_PERM]
            dense[f"{layer}.weight"] = (weight if perm is None else weight[:, perm.long().argsort()]).bfloat16()
        elif suffix not in ck.COMET_SUFFIXES:
            dense[name] = value
    save_file(dense, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG | SHAPE))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Engines of every mode on one GPU and on two, started together; they are small."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, this machine has {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("multi")
    comet = tiny.write(folder / "comet", kv_group_size=128, slices=2, **SHAPE)
    dense = dequantise(comet, folder / "bf16")
    modes = {"comet": (comet, {}), "bf16": (dense, {}), "fp8": (dense, {"quantization": "fp8"})}
    jobs = {(mode, "one"): {} for mode in modes} | {(mode, "tp2"): TWO["tp2"] for mode in modes}
    jobs["comet", "pp2"] = TWO["pp2"]

    def start(job):
        (mode, where), options = job
        model, extra = modes[mode]
        env = {**os.environ, "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"}
        if where == "one":
            env["CUDA_VISIBLE_DEVICES"] = str(list(modes).index(mode) % 2)
        return engine.run(model, [PROMPTS], TOKENS, env, check=False, dtype="bfloat16", enforce_eager=False,
                          max_num_seqs=32, kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.05,
                          disable_custom_all_reduce=True, **extra, **options,
                          compilation_config={"cudagraph_capture_sizes": [8, 16, 32]})

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(start, jobs.items()), strict=True))


def agreement(one, other):
    """Mean share of each prompt's tokens before the first that differs, and the median difference of the first token's
    log-probabilities."""
    shares, errors = [], []
    for a, b in zip(one.outputs[0], other.outputs[0], strict=True):
        same = [x == y for x, y in zip(a["tokens"], b["tokens"], strict=True)]
        shares.append((same + [False]).index(False) / TOKENS)
        first, again = a["logprobs"][0], b["logprobs"][0]
        errors += [abs(first[token] - again[token]) for token in set(first) & set(again)]
    return mean(shares), median(errors)


def test_two_ranks_agree_with_one_as_vllms_modes_do(runs):
    found = {mode: agreement(runs[mode, "one"], runs[mode, "tp2"]) for mode in ("comet", "bf16", "fp8")
             if runs[mode, "one"].outputs and runs[mode, "tp2"].outputs}
    print("tensor parallel 2 against 1, share of greedy tokens and log-probability difference:", found)
    for (_, where), run in runs.items():
        assert where == "pp2" or run.outputs, run.log[-4000:]
    share, error = found["comet"]
    assert share >= found["fp8"][0] - 0.1
    assert error <= 2 * found["fp8"][1] + 0.01


def test_pipeline_parallel_changes_nothing_but_rounding(runs):
    assert runs["comet", "pp2"].outputs, runs["comet", "pp2"].log[-4000:]
    share, error = agreement(runs["comet", "one"], runs["comet", "pp2"])
    print("pipeline parallel 2 against 1:", share, error)
    assert share > 0.9 and error < 0.01
