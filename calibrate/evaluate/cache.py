# SPDX-License-Identifier: Apache-2.0
"""Answers kept on disk, so that an interrupted run goes on where it stopped and an unchanged model is not asked twice.

One JSONL file for a question set: its name is the hash of everything the answers depend on (checkpoint, mode,
settings), its first line says what that is, each further line holds one answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=Hashable)


def hash_of(value: Any) -> str:
    """Hash of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Cache:
    def __init__(self, directory: Path):
        self.directory = directory

    def answers(self, key: dict[str, Any], names: Sequence[str], ask: Callable[[list[str]], list[Any]],
                chunk: int) -> list[Any]:
        """The JSON-serialisable answer of every name, in order. ``ask`` is called for unknown names only, ``chunk`` of
        them at a time, and its answers are on disk before the next call."""
        path = self._path(key)
        known = self._read(path, key)
        missing = [name for name in names if name not in known]
        for start in range(0, len(missing), chunk):
            part = missing[start:start + chunk]
            found = dict(zip(part, ask(part), strict=True))
            self._append(path, found.items())
            known |= json.loads(json.dumps(found))  # what a later run will read
        return [known[name] for name in names]

    def _path(self, key: dict[str, Any]) -> Path:
        return self.directory / f"{hash_of(key)[:24]}.jsonl"

    def _read(self, path: Path, key: dict[str, Any]) -> dict[str, Any]:
        """Answers on disk. A last line that an interruption cut short is dropped, and the file mended."""
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(key, sort_keys=True) + "\n")
            return {}
        content = path.read_text(encoding="utf-8")
        whole = content[: content.rfind("\n") + 1]
        if whole != content:
            path.write_text(whole, encoding="utf-8")
        return dict(json.loads(line) for line in whole.splitlines()[1:])

    @staticmethod
    def _append(path: Path, found: Iterable[tuple[str, Any]]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair) + "\n" for pair in found)
