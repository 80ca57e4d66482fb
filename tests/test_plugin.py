# SPDX-License-Identifier: Apache-2.0
"""Registration is light, idempotent and harmless; settings and unsupported layers say what is wrong."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import vllm_comet
from vllm_comet.settings import Settings

LEAN = """
import sys, vllm_comet
assert not {"torch", "triton", "vllm", "transformers"} & set(sys.modules), sorted(sys.modules)
import vllm_comet.checkpoint
assert "vllm" not in sys.modules and "triton" not in sys.modules
import calibrate
assert "vllm" not in sys.modules
"""

REGISTER = """
import sys, torch, vllm_comet
vllm_comet.register(); vllm_comet.register()
assert not torch.cuda.is_initialized()
assert not [m for m in sys.modules if m.startswith("vllm_comet.kernels")], "kernels load with the first layer"
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert get_quantization_config("comet").__name__ == "CometConfig"
assert AttentionBackendEnum["COMET"].get_class().__name__ == "CometAttentionBackend"
import os
from vllm import envs
os.environ["VLLM_COMET_ACTIVATIONS"] = "mixed"
assert envs.compile_factors()["VLLM_COMET_ACTIVATIONS"] == "mixed", "it decides what the compiled graph does"
"""

UNFIT = """
import vllm; vllm.__version__ = "{version}"
import vllm_comet; vllm_comet.register()
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
assert "comet" not in QUANTIZATION_METHODS
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_import_is_lean():
    python(LEAN)


def test_register_is_idempotent_and_light():
    python(REGISTER)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "dev"])
def test_an_unsupported_vllm_is_one_clear_line(version):
    log = python(UNFIT.format(version=version))
    lines = [line for line in log.splitlines() if "vllm-comet" in line]
    assert len(lines) == 1 and f"this is {version}" in lines[0] and ">= 0.32, < 0.34" in lines[0]


def test_supported_versions_match_the_package_metadata():
    from importlib.metadata import requires

    (cuda,) = [r for r in requires("vllm-comet") if r.startswith("vllm<") or r.startswith("vllm>")]
    (low, high) = vllm_comet.SUPPORTED_VLLM
    assert f">={low[0]}.{low[1]}" in cuda and f"<{high[0]}.{high[1]}" in cuda


def test_settings_precedence(monkeypatch):
    assert Settings.load() == Settings("auto", True)
    monkeypatch.setenv("VLLM_COMET_ACTIVATIONS", "mixed")
    monkeypatch.setenv("VLLM_COMET_VERIFY", "0")
    assert Settings.load({}) == Settings("mixed", False)
    assert Settings.load({"comet": {"activations": "int8"}}) == Settings("int8", False)


@pytest.mark.parametrize("given, message", [
    ({"comet": {"activation": "int8"}}, "unknown keys .'activation'.; allowed: activations."),
    ({"comet": {"activations": "int4"}}, "comet.activations is 'int4'; allowed: auto, mixed, int8"),
    ({"comet": "int8"}, "must be an object"),
])
def test_settings_errors(given, message):
    with pytest.raises(ValueError, match=message):
        Settings.load(given)


def test_settings_error_names_the_variable(monkeypatch):
    monkeypatch.setenv("VLLM_COMET_ACTIVATIONS", "fp8")
    with pytest.raises(ValueError, match="VLLM_COMET_ACTIVATIONS is 'fp8'"):
        Settings.load()


def test_the_flag_on_a_model_that_is_no_comet_checkpoint_names_the_calibrator():
    from vllm_comet.quantization.config import CometConfig

    with pytest.raises(ValueError, match="--quantization comet needs a COMET checkpoint.* comet-calibrate MODEL"):
        CometConfig()


@pytest.mark.parametrize("gpu, mode, largest, tokens, advised", [
    (True, "FULL_AND_PIECEWISE", 512, 8192, "more than 512 tokens .* --max-cudagraph-capture-size 2048"),
    (True, "PIECEWISE", 512, 1024, "--max-cudagraph-capture-size 1024"),
    (True, "PIECEWISE", 2048, 8192, None), (True, "PIECEWISE", 512, 512, None), (True, "PIECEWISE", None, 8192, None),
    (True, "FULL_DECODE_ONLY", 512, 8192, None), (True, "NONE", 0, 8192, None), (False, "PIECEWISE", 512, 8192, None),
])
def test_longer_cuda_graphs_are_advised_where_steps_can_exceed_them(monkeypatch, gpu, mode, largest, tokens, advised):
    from vllm.config import CUDAGraphMode

    from vllm_comet.quantization import config as module

    log = []
    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda_alike=lambda: gpu))
    monkeypatch.setattr(module.logger, "info_once", lambda text, *args: log.append(text % args))
    module._advise_graph_size(SimpleNamespace(
        compilation_config=SimpleNamespace(max_cudagraph_capture_size=largest, cudagraph_mode=CUDAGraphMode[mode]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens)))
    assert re.search(advised, log.pop()) if advised else not log


def attention_layer(**changes):
    impl = SimpleNamespace(alibi_slopes=None, logits_soft_cap=0, scale=0.125)
    layer = dict(attn_type="decoder", head_size=64, head_size_v=64, kv_sharing_target_layer_name=None, has_sink=False,
                 use_mm_prefix=False, impl=impl, num_heads=4, num_kv_heads=2, sliding_window=None,
                 kv_cache_dtype="auto", attn_backend=None)
    return SimpleNamespace(**layer | changes)


def engine_config(cache_dtype="auto", backend=None, connector=None, dcp=1):
    return SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        attention_config=SimpleNamespace(backend=backend and SimpleNamespace(name=backend)),
        kv_transfer_config=connector and SimpleNamespace(kv_connector=connector),
        parallel_config=SimpleNamespace(decode_context_parallel_size=dcp),
    )


@pytest.fixture
def select(monkeypatch):
    from vllm_comet.attention import select as module
    from vllm_comet.checkpoint import KVCacheFormat

    log = []
    monkeypatch.setattr("vllm_comet.attention.backend.current_platform", SimpleNamespace(is_cuda=lambda: False))
    monkeypatch.setattr(module.logger, "info_once", lambda text, *args: log.append(text % args))
    monkeypatch.setattr(module.logger, "warning_once", lambda text, *args: log.append(text % args))

    def run(layer, config):
        monkeypatch.setattr(module, "get_current_vllm_config", lambda: config)
        log.clear()
        module.select_kv_cache(layer, "model.layers.0.attn", KVCacheFormat(64))
        return layer.attn_backend is not None, log[-1] if log else ""

    return run


def test_a_plain_decoder_layer_uses_the_4_bit_cache(select):
    layer = attention_layer()
    used, log = select(layer, engine_config())
    assert used and "72 bytes per token and KV head, 3.56x less" in log
    assert layer.attn_backend.get_name() == "COMET" and layer.impl.group_size == 64
    impl = layer.impl
    select(layer, engine_config())
    assert layer.impl is impl, "vLLM asks twice; the second call changes nothing"


@pytest.mark.parametrize("config, reason", [
    (engine_config(cache_dtype="fp8"), "--kv-cache-dtype fp8 was given"),
    (engine_config(cache_dtype="bfloat16"), "--kv-cache-dtype bfloat16 was given"),
    (engine_config(backend="TRITON_ATTN"), "--attention-backend TRITON_ATTN was given"),
    (engine_config(connector="NixlConnector"), "KV connector NixlConnector"),
])
def test_an_explicit_choice_wins_and_is_logged(select, config, reason):
    used, log = select(attention_layer(), config)
    assert not used and reason in log


UNSUPPORTED = [
    (dict(attn_type="encoder_only"), "attention type encoder_only"),
    (dict(head_size=80, head_size_v=80), "head_dim 80 is not a multiple of the KV group size 64"),
    (dict(head_size_v=128), "K and V heads differ"),
    (dict(has_sink=True), "attention sinks"),
    (dict(impl=SimpleNamespace(alibi_slopes=[1.0], logits_soft_cap=0)), "ALiBi"),
    (dict(impl=SimpleNamespace(alibi_slopes=None, logits_soft_cap=50.0)), "soft-capping"),
    (dict(use_mm_prefix=True), "multimodal prefixes"),
]


@pytest.mark.parametrize("changes, reason", UNSUPPORTED)
def test_a_layer_it_cannot_serve_keeps_vllms_cache_with_a_reason(select, changes, reason):
    used, log = select(attention_layer(**changes), engine_config())
    assert not used and reason in log


@pytest.mark.parametrize("changes, reason", [
    (dict(head_size=192, head_size_v=192), r"head_dim 192 has no GPU kernel; allowed: \(64, 96, 128, 256\)"),
    (dict(num_heads=64), "64 query heads over 2 KV heads are more than 16 per KV head"),
])
def test_gpu_kernels_have_limits_of_their_own(select, monkeypatch, changes, reason):
    from vllm_comet.attention import select as module

    monkeypatch.setattr(module, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    used, log = select(attention_layer(**changes), engine_config())
    assert not used and re.search(reason, log)


@pytest.mark.parametrize("changes, reason", UNSUPPORTED)
def test_an_explicit_comet_backend_that_cannot_serve_is_an_error(select, changes, reason):
    with pytest.raises(ValueError, match=f"--attention-backend COMET can't serve model.layers.0.attn: .*{reason}"):
        select(attention_layer(**changes), engine_config(backend="COMET"))


def test_shared_kv_layers_are_refused(select):
    with pytest.raises(ValueError, match="--kv-cache-dtype bfloat16"):
        select(attention_layer(kv_sharing_target_layer_name="model.layers.3.attn"), engine_config())
