# SPDX-License-Identifier: Apache-2.0
"""How comet-eval reads models and modes, what it refuses, and its cache."""

import contextlib
import json

import pytest
import tiny
import torch
from calibrate_tiny import save_tiny

from calibrate.evaluate.cache import Cache
from calibrate.evaluate.candidates import check_distinct, check_tokenizers, digest, parse_candidate
from calibrate.evaluate.errors import EvaluationError


@pytest.fixture(scope="module")
def comet(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("comet") / "model")
    tiny.write_tokenizer(folder)
    return folder


def parse(text):
    with contextlib.ExitStack() as stack:
        return parse_candidate(str(text), stack)


@pytest.mark.parametrize("mode, activations, kv4, engine", [
    ("", "auto", True, {"additional_config": {"comet": {"activations": "auto"}}}),
    ("@mixed", "mixed", True, {"additional_config": {"comet": {"activations": "mixed"}}}),
    ("@int8,kv16", "int8", False, {"additional_config": {"comet": {"activations": "int8"}},
                                   "kv_cache_dtype": "bfloat16"}),
    ("@kv16,max_num_seqs=4", "auto", False, {"additional_config": {"comet": {"activations": "auto"}},
                                             "kv_cache_dtype": "bfloat16", "max_num_seqs": 4}),
])
def test_modes_of_a_comet_checkpoint(comet, mode, activations, kv4, engine):
    found = parse(f"name={comet}{mode}")
    assert (found.label, found.activations, found.kv4) == ("name", activations, kv4)
    assert found.engine_arguments() == {"model": str(comet)} | engine


def test_modes_change_what_the_simulation_computes(comet):
    ids = torch.arange(3, 40).unsqueeze(0)
    logits = {mode: parse(f"{comet}@{mode}").torch_model(torch.device("cpu"), torch.float32)(ids).logits
              for mode in ("auto", "int8", "mixed", "weights", "int8,kv16")}
    assert torch.equal(logits["auto"], logits["int8"])
    names = ["int8", "mixed", "weights", "int8,kv16"]
    assert all(not torch.equal(logits[a], logits[b]) for a in names for b in names if a < b)


def test_dummy_is_a_config_without_weights():
    with contextlib.ExitStack() as stack:
        found = parse_candidate("dummy:llama3-8b:comet", stack)
        config = json.loads((found.directory / "config.json").read_text())
        assert (config["hidden_size"], config["quantization_config"]["quant_method"]) == (4096, "comet")
        assert found.engine_arguments()["load_format"] == "dummy" and found.label == "llama3-8b-comet"
    with pytest.raises(EvaluationError, match="shapes: llama3-8b, .*formats: comet"):
        parse("dummy:llama3-8b:int3")


def test_labels_come_from_folder_and_mode_and_must_differ(comet):
    assert parse(comet).label == "model" and parse(f"{comet}@mixed").label == "model-mixed"
    with pytest.raises(EvaluationError, match="Several models are called model"):
        check_distinct([parse(comet), parse(comet)])


@pytest.mark.parametrize("mode, message", [
    ("@fast", "mode 'fast'; allowed: one of auto, int8, mixed, weights, and kv16"),
    ("@int8,mixed", "mode 'int8,mixed'"),
])
def test_unknown_modes_are_refused(comet, mode, message):
    with pytest.raises(EvaluationError, match=message):
        parse(f"{comet}{mode}")


def test_what_a_backend_cannot_run_is_refused(comet, tmp_path):
    with pytest.raises(EvaluationError, match="vLLM serves auto, int8 and mixed"):
        parse(f"{comet}@weights").engine_arguments()
    plain = save_tiny(tmp_path / "plain", "Llama")
    with pytest.raises(EvaluationError, match="int8 is a mode of COMET checkpoints"):
        parse(f"{plain}@int8")
    served = parse(f"{plain}@quantization=fp8")
    assert served.engine_arguments() == {"model": str(plain), "quantization": "fp8"}
    with pytest.raises(EvaluationError, match="quantization is for vLLM; choose --backend vllm"):
        served.check_backend("torch")
    with pytest.raises(EvaluationError, match="holds no config.json"):
        parse(tmp_path)


def test_another_tokenizer_is_refused(comet, tmp_path):
    base = parse(save_tiny(tmp_path / "base", "Llama"))
    check_tokenizers(base, [base])
    with pytest.raises(EvaluationError, match="model has another tokenizer than base: [0-9]+ entries"):
        check_tokenizers(base, [parse(comet)])


def test_same_vocabulary_but_other_tokens_are_refused(tmp_path):
    base, other = (save_tiny(tmp_path / name, "Llama") for name in ("base", "other"))
    path = other / "tokenizer.json"
    found = json.loads(path.read_text())
    found["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(found))
    with pytest.raises(EvaluationError, match="the same text gives other tokens"):
        check_tokenizers(parse(base), [parse(other)])


def test_digest_depends_on_weights_and_config(comet, tmp_path):
    first, same, other = (tiny.write(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert digest(first) == digest(same) != digest(other)
    (same / "config.json").write_text((same / "config.json").read_text() + "\n")
    assert digest(first) != digest(same)


def test_cache_asks_only_what_it_does_not_know(tmp_path):
    cache, asked = Cache(tmp_path), []

    def ask(names):
        asked.append(list(names))
        return [{"value": name} for name in names]

    assert cache.answers({"k": 1}, ["a", "b", "c"], ask, chunk=2) == [{"value": n} for n in "abc"]
    assert cache.answers({"k": 1}, ["c", "d", "a"], ask, chunk=2) == [{"value": n} for n in "cda"]
    assert asked == [["a", "b"], ["c"], ["d"]]
    cache.answers({"k": 2}, ["a"], ask, chunk=2)
    assert asked[-1] == ["a"]


def test_cache_survives_an_interruption(tmp_path):
    def interrupted(names):
        if names == ["c"]:
            raise KeyboardInterrupt
        return [1] * len(names)

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path).answers({}, ["a", "b", "c"], interrupted, chunk=1)
    [path] = tmp_path.iterdir()
    path.write_text(path.read_text() + '["c", {"cut sh')
    assert Cache(tmp_path).answers({}, ["a", "b", "c"], lambda names: [2] * len(names), chunk=1) == [1, 1, 2]
    assert Cache(tmp_path).answers({}, ["c"], interrupted, chunk=1) == [2]
