# SPDX-License-Identifier: Apache-2.0
"""Writes the checkpoint: first beside its final place, one file a finished layer, then merged, verified and renamed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from calibrate.errors import CalibrationError
from calibrate.loading import ModelSource
from vllm_comet.checkpoint import CheckpointSummary, CometFormat, save_shard, verify_checkpoint

_SHARD_BYTES = 4 * 2**30
_RUN = "run.json"


class Workspace:
    """``OUT.partial``: finished layers of a run that may be resumed, later the checkpoint before it gets its name."""

    def __init__(self, out: Path, run: dict[str, Any], resume: bool):
        self.out, self.partial = out, out.with_name(out.name + ".partial")
        self.layers = self.partial / "layers"
        if out.exists():
            raise CalibrationError(f"--out {out} exists already; choose another folder or remove it.")
        if not self.partial.exists():
            self.layers.mkdir(parents=True)
            _write_json(self.partial / _RUN, run)
        elif not resume:
            raise CalibrationError(f"{self.partial} is left from an interrupted run; continue it with --resume or "
                                   "remove it.")
        else:
            self._check_same_run(run)

    def _check_same_run(self, run: dict[str, Any]) -> None:
        before = json.loads((self.partial / _RUN).read_text()) if (self.partial / _RUN).exists() else {}
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

    def finish(self) -> CheckpointSummary:
        """Verify every tensor, drop the working files and give the checkpoint its name."""
        summary = verify_checkpoint(self.partial)
        shutil.rmtree(self.layers)
        (self.partial / _RUN).unlink()
        os.rename(self.partial, self.out)
        return summary


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


def write_metadata(source: ModelSource, config: PretrainedConfig, comet: CometFormat, directory: Path) -> None:
    """config.json with the comet section, tokenizer, chat template and generation config."""
    raw = json.loads((source.directory / "config.json").read_text())
    raw.pop("torch_dtype", None)
    raw.update(architectures=config.architectures, dtype="bfloat16", quantization_config=comet.to_dict())
    _write_json(directory / "config.json", raw)
    source.tokenizer().save_pretrained(directory)
    if (source.directory / "generation_config.json").exists():
        shutil.copyfile(source.directory / "generation_config.json", directory / "generation_config.json")
