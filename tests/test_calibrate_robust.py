# SPDX-License-Identifier: Apache-2.0
"""What goes wrong during a calibration: the process is killed, the disk is full, files are damaged. One clear error,
never half a checkpoint, and a resumed run ends with the same bytes."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from calibrate_tiny import save_tiny, write_text
from safetensors.torch import load_file, save_file

from calibrate.__main__ import main

FORK = multiprocessing.get_context("forkserver")  # children start without the threads of this process
FORK.set_forkserver_preload(["calibrate.pipeline", "calibrate.report"])


def arguments(model: Path, out: Path, text: Path, *options: str) -> list[str]:
    return [str(model), "--out", str(out), "--data", str(text), "--samples", "4", "--length", "64", *options]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "Qwen2")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, text) -> dict[str, bytes]:
    """The files of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(model, out, text)) == 0
    return contents(out)


def refused(capsys, argv: list[str]) -> str:
    """The one line of a run that must fail."""
    assert main(argv) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in printed if line.startswith("comet-calibrate: error: ")]
    assert len(errors) == 1 and errors[0] == printed[-1]
    return errors[0]


# ------------------------------------------------------------------------------------------------------------- killed
def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_until(argv: list[str], where: str, call: int, when: str) -> None:
    """Child process: calibrate, and get SIGKILL ``when`` (before, amid, after) the ``call``-th call of ``where``."""
    module_name, _, name = where.partition(":")
    module = sys.modules[module_name]
    function, calls = getattr(module, name), 0

    def killing(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls != call:
            return function(*args, **kwargs)
        if when == "before":
            die()
        result = function(*args, **kwargs)
        if when == "amid":  # a file is there, half written
            (path,) = (arg for arg in args if isinstance(arg, Path))
            os.truncate(path, path.stat().st_size // 2)
        die()
        return result

    setattr(module, name, killing)
    main(argv)


@pytest.mark.parametrize(("where", "call", "when"), [
    ("calibrate.export:_write_json", 1, "before"),  # the folder exists, its description does not
    ("calibrate.export:save_file", 1, "amid"),
    ("calibrate.export:save_file", 2, "after"),  # tensors without their report
    ("calibrate.export:_write_json", 3, "after"),  # the last layer is finished
    ("calibrate.export:save_shard", 1, "amid"),
    ("calibrate.pipeline:write_metadata", 1, "before"),
    ("calibrate.export:verify_checkpoint", 1, "after"),
    ("os:rename", 1, "before"),
    ("os:rename", 1, "after"),  # the checkpoint has its name, working files are left
])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, model, text, whole, where, call, when):
    out = tmp_path / "out"
    child = FORK.Process(target=run_until, args=(arguments(model, out, text, "--host-memory", "0", "--gpu-memory", "0"),
                                                 where, call, when))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert out.exists() == ((where, when) == ("os:rename", "after"))
    assert main(arguments(model, out, text, "--resume")) == 0
    assert contents(out) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_model_is_not_mixed_in(tmp_path, model, text, capsys):
    """The same embedding and shapes, other layers: a fine-tuned model, say."""
    out, other = tmp_path / "out", save_tiny(tmp_path / "model", "Qwen2")
    where = "calibrate.export:save_file", 2, "before"
    child = FORK.Process(target=run_until, args=(arguments(model, out, text), *where))
    child.start()
    child.join()
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert "layer 0 of the model is not what" in refused(capsys, arguments(other, out, text, "--resume"))


def test_hidden_states_in_files_change_nothing(tmp_path, model, text, whole):
    out = tmp_path / "out"
    assert main(arguments(model, out, text, "--host-memory", "0.0002", "--gpu-memory", "0")) == 0
    assert contents(out) == whole


# --------------------------------------------------------------------------------------------------------- full disk
def run_with_little_room(argv: list[str], bytes_a_file: int, code) -> None:
    """Child process: every write beyond that size fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))
    with open(code, "w") as log:
        sys.stderr = log
        result = main(argv)
    os._exit(result)


@pytest.mark.parametrize(("bytes_a_file", "options"), [
    (120_000, []),  # a layer's tensors do not fit
    (200_000, ["--host-memory", "0", "--gpu-memory", "0"]),  # hidden states do not fit
    (400_000, []),  # the layers fit, the checkpoint does not
])
def test_a_disk_that_fills_up(tmp_path, model, text, whole, bytes_a_file, options):
    out, log = tmp_path / "out", tmp_path / "log"
    child = FORK.Process(target=run_with_little_room, args=(arguments(model, out, text, *options), bytes_a_file, log))
    child.start()
    child.join()
    assert child.exitcode == 1
    lines = [line for line in log.read_text().splitlines() if line.startswith("comet-calibrate: error: ")]
    assert len(lines) == 1 and "File too large" in lines[0]
    assert not out.exists()
    assert main(arguments(model, out, text, "--resume")) == 0
    assert contents(out) == whole


def test_a_disk_too_small_is_refused_before_the_work(tmp_path, model, text, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 300_000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    message = refused(capsys, arguments(model, tmp_path / "new" / "out", text))
    assert f"{tmp_path} has 0.0 GiB left; this run writes up to" in message
    assert not (tmp_path / "new").exists()


# ----------------------------------------------------------------------------------------------------- damaged models
def shards(folder: Path, model: Path) -> Path:
    """The same model in two files with an index."""
    save_tiny(folder, "Qwen2")
    tensors = load_file(model / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-{1 + ('layers.1.' in name)}.safetensors" for name in tensors}
    for file in sorted(set(weight_map.values())):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def truncate(folder: Path) -> str:
    path = folder / "model-2.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return "model-2.safetensors can't be read"


def remove(folder: Path) -> str:
    (folder / "model-2.safetensors").unlink()
    return "model-2.safetensors can't be read"


def break_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("{")
    return "model.safetensors.index.json is no index of tensors"


def forget_tensor(folder: Path) -> str:
    tensors = load_file(folder / "model-2.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model-2.safetensors", {"format": "pt"})
    return "model.layers.1.mlp.up_proj.weight"


def other_width(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 384}))
    return "layer 0 of the model's files does not fit its config.json: "


def break_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    return "config.json can't be used"


def lose_tokenizer(folder: Path) -> str:
    for path in folder.glob("*token*"):
        path.unlink()
    return "has no usable tokenizer"


@pytest.mark.parametrize("damage", [truncate, remove, break_index, forget_tensor, other_width, break_config,
                                    lose_tokenizer])
def test_a_damaged_model_is_one_clear_error(tmp_path, model, text, capsys, damage):
    folder = shards(tmp_path / "model", model)
    expected = damage(folder)
    assert expected in refused(capsys, arguments(folder, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()


def test_a_nan_that_only_the_second_layer_meets(tmp_path, model, text, capsys):
    folder = shards(tmp_path / "model", model)
    tensors = load_file(folder / "model-2.safetensors")
    tensors["model.layers.1.input_layernorm.weight"].fill_(3e38)
    save_file(tensors, folder / "model-2.safetensors", {"format": "pt"})
    message = refused(capsys, arguments(folder, tmp_path / "out", text))
    assert "the input of model.layers.1.self_attn.q_proj is NaN or infinite" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [3e38, 3e30])
def test_a_last_layer_that_overflows(tmp_path, model, text, capsys, value):
    """No later layer would meet its output."""
    folder = shards(tmp_path / "model", model)
    tensors = load_file(folder / "model-2.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = value
    save_file(tensors, folder / "model-2.safetensors", {"format": "pt"})
    assert "model.layers.1" in refused(capsys, arguments(folder, tmp_path / "out", text))
    assert not (tmp_path / "out").exists()
