# SPDX-License-Identifier: Apache-2.0
"""Where a calibration computes, and its hidden states between two passes over the text: on the GPUs as far as they have
room, then in host memory, then in files. A chunk is a few samples, ``[B, T, channels]``; one at a time is worked on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class _File:
    path: Path
    shape: torch.Size
    dtype: torch.dtype


def calibration_devices() -> tuple[torch.device, ...]:
    """Every GPU that this process sees (``CUDA_VISIBLE_DEVICES``), or the CPU."""
    return tuple(torch.device("cuda", i) for i in range(torch.cuda.device_count())) or (torch.device("cpu"),)


def avoid_fragmentation() -> None:
    """Let PyTorch grow its GPU memory in place; matrices of many sizes come and go. Before the GPU is first used."""
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def release_cached_memory(device: torch.device) -> None:
    """Return what PyTorch keeps of freed memory of all GPUs, which pieces of another size could not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def default_device_budget(device: torch.device) -> int:
    """Bytes of memory a calibration may take on a GPU by default: 24 GiB, or most of a smaller one's."""
    if device.type == "cpu":
        return 0
    return min(24 * 2**30, int(0.9 * torch.cuda.get_device_properties(device).total_memory))


def default_host_budget() -> int:
    """Bytes that hidden states may take by default: half of the memory of the machine, or of its control group."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return total // 2


class HiddenStore:
    """Room for chunks: so many bytes on each device of ``room``, in its order, then files in ``folder`` (made for the
    first).

    ``device`` is where chunks are worked on. Where a chunk lies changes nothing in its values.
    """

    def __init__(self, device: torch.device, room: dict[torch.device, int], folder: Path):
        self.device, self.spilled = device, 0
        self._left = dict(room)
        self._folder, self._numbers = folder, itertools.count()

    def states(self, count: int) -> HiddenStates:
        """``count`` chunks yet to be set."""
        return HiddenStates(self, count)

    def keep(self, chunk: torch.Tensor, previous: torch.Tensor | _File | None) -> torch.Tensor | _File:
        """Store ``chunk`` where ``previous`` was if it fits there."""
        if isinstance(previous, torch.Tensor):
            if previous.device != chunk.device and previous.shape == chunk.shape:
                return previous.copy_(chunk)  # its pages are there already
            self._left[previous.device] += previous.nbytes
        for place, left in self._left.items():
            if chunk.nbytes <= left:
                self._left[place] -= chunk.nbytes
                if isinstance(previous, _File):
                    previous.path.unlink()
                return chunk.to(place)
        return self._write(chunk.cpu(), previous)

    def load(self, held: torch.Tensor | _File) -> torch.Tensor:
        if isinstance(held, _File):
            data = torch.from_numpy(np.fromfile(held.path, np.uint8))
            held = data.view(held.dtype).view(held.shape)
        return held.to(self.device)

    def _write(self, chunk: torch.Tensor, previous: torch.Tensor | _File | None) -> _File:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = previous.path if isinstance(previous, _File) else self._folder / f"{next(self._numbers)}.bin"
        with path.open("wb") as handle:  # numpy's tofile hides why a write fell short
            handle.write(chunk.contiguous().view(torch.uint8).numpy().data)
        self.spilled += chunk.nbytes if not isinstance(previous, _File) else 0
        return _File(path, chunk.shape, chunk.dtype)


class HiddenStates:
    """A sequence of chunks; reading one brings it to the device in the precision it was stored in."""

    def __init__(self, store: HiddenStore, count: int):
        self._store = store
        self._chunks: list[torch.Tensor | _File | None] = [None] * count

    def __len__(self) -> int:
        return len(self._chunks)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> torch.Tensor:
        held = self._chunks[index]
        assert held is not None, "read before it was set"
        return self._store.load(held)

    def __setitem__(self, index: int, chunk: torch.Tensor) -> None:
        self._chunks[index] = self._store.keep(chunk, self._chunks[index])


@dataclass
class Streams:
    """What a layer is calibrated on, of the quantised model and of the unquantised one (``exact``).

    hidden, exact: the layer's input. middle, exact_middle: scratch for what lies between its two halves. tokens: of all
    chunks together.
    """

    hidden: HiddenStates
    exact: HiddenStates
    middle: HiddenStates
    exact_middle: HiddenStates
    tokens: int

    @classmethod
    def start(cls, store: HiddenStore, count: int, tokens: int, embedded: Iterable[torch.Tensor]) -> Streams:
        """Both models begin with the same ``count`` chunks of embeddings."""
        hidden, exact, middle, exact_middle = (store.states(count) for _ in range(4))
        streams = cls(hidden, exact, middle, exact_middle, tokens)
        for i, chunk in enumerate(embedded):
            streams.hidden[i] = streams.exact[i] = chunk
        return streams
