# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoint: first beside its final place, one file a finished layer, then merged, verified and renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from calibrate.errors import CalibrationError
from calibrate.loading import ModelSource
from vllm_comet.checkpoint import CheckpointSummary, CometFormat, save_shard, verify_checkpoint

_SHARD_BYTES = 4 * 2**30
_PARTIAL = ".partial"
_RUN = "run.json"
REPORT = "comet_report.json"


class Workspace:
    """``OUT.partial``: finished layers of a run that may be resumed, and the checkpoint before it gets its name."""

    def __init__(self, out: Path, run: dict[str, Any], resume: bool, num_bytes: int = 0):
        """num_bytes: what a run will write; a disk with less left is refused before the work, not after."""
        self.out, self.partial = out, out.with_name(out.name + _PARTIAL)
        self.layers, self.checkpoint = self.partial / "layers", self.partial / "checkpoint"
        if out.exists():
            raise CalibrationError(f"--out {out} exists already; choose another folder or remove it.")
        if self.partial.exists() and not resume:
            raise CalibrationError(f"{self.partial} is left from an interrupted run; continue it with --resume or "
                                   "remove it.")
        if (self.partial / _RUN).exists():
            self._check_same_run(run)
        else:
            self._check_disk(num_bytes)
        self.layers.mkdir(parents=True, exist_ok=True)
        _write_json(self.partial / _RUN, run)

    def _check_disk(self, num_bytes: int) -> None:
        folder = next(p for p in self.partial.absolute().parents if p.exists())
        free = shutil.disk_usage(folder).free
        if free < num_bytes:
            raise CalibrationError(f"{folder} has {free / 2**30:.1f} GiB left; this run writes up to "
                                   f"{num_bytes / 2**30:.1f} GiB. Free some, or choose another --out.")

    def _check_same_run(self, run: dict[str, Any]) -> None:
        before = json.loads((self.partial / _RUN).read_text())
        changed = sorted(key for key in run if before.get(key) != run[key])
        if changed:
            raise CalibrationError(f"--resume: {self.partial} was begun with other settings: " + ", ".join(
                f"{key} {before.get(key)!r}, now {run[key]!r}" for key in changed) + ".")

    def has_layer(self, index: int) -> bool:
        return self._report(index).exists()

    def save_layer(self, index: int, tensors: dict[str, torch.Tensor], report: dict[str, Any]) -> None:
        """The report is written last: it marks the layer as finished."""
        save_file(tensors, self._tensors(index))
        _write_json(self._report(index), report)

    def load_layer(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self._tensors(index))

    def load_report(self, index: int) -> dict[str, Any]:
        return json.loads(self._report(index).read_text())

    def _tensors(self, index: int) -> Path:
        return self.layers / f"{index:04d}.safetensors"

    def _report(self, index: int) -> Path:
        return self.layers / f"{index:04d}.json"

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for files that no later run needs; removed at the end, and what a killed run left, at the start."""
        folder = self.partial / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def begin_checkpoint(self) -> Path:
        """An empty folder to write the checkpoint into."""
        shutil.rmtree(self.checkpoint, ignore_errors=True)
        self.checkpoint.mkdir()
        return self.checkpoint

    def finish(self) -> CheckpointSummary:
        """Verify every tensor, give the checkpoint its name in one step, and drop the working files."""
        summary = verify_checkpoint(self.checkpoint)
        os.rename(self.checkpoint, self.out)
        shutil.rmtree(self.partial)
        return summary


def finish_interrupted(out: Path) -> bool:
    """Whether ``out`` is a finished checkpoint; drops the working files of a run that ended just after naming it."""
    if not (out / "config.json").exists():
        return False
    verify_checkpoint(out)
    shutil.rmtree(out.with_name(out.name + _PARTIAL), ignore_errors=True)
    return True


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, path)


class ShardWriter:
    """Collects tensors into files of about 4 GiB and writes the index when there is more than one."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._shards: list[tuple[Path, list[str], int]] = []

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        if self._pending and self._bytes + size > _SHARD_BYTES:
            self._flush()
        self._pending.update(tensors)
        self._bytes += size

    def _flush(self) -> None:
        path = self.directory / f"shard-{len(self._shards)}.safetensors"
        save_shard(self._pending, path)
        self._shards.append((path, sorted(self._pending), self._bytes))
        self._pending, self._bytes = {}, 0

    def close(self) -> None:
        self._flush()
        count = len(self._shards)
        if count == 1:
            os.replace(self._shards[0][0], self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (path, names, _) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(path, self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        total = sum(size for _, _, size in self._shards)
        _write_json(self.directory / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_report(directory: Path, layers: list[dict[str, Any]]) -> None:
    """Errors and INT8 blocks of every layer, for people; nothing reads it to serve the model."""
    _write_json(directory / REPORT, {"layers": layers})


def write_metadata(source: ModelSource, config: PretrainedConfig, comet: CometFormat, directory: Path) -> None:
    """config.json with the comet section, tokenizer, chat template and generation config."""
    raw = json.loads((source.directory / "config.json").read_text())
    raw.pop("torch_dtype", None)
    raw.update(architectures=config.architectures, dtype="bfloat16", quantization_config=comet.to_dict(),
               tie_word_embeddings=config.tie_word_embeddings)
    _write_json(directory / "config.json", raw)
    source.tokenizer().save_pretrained(directory)
    if (source.directory / "generation_config.json").exists():
        shutil.copyfile(source.directory / "generation_config.json", directory / "generation_config.json")
