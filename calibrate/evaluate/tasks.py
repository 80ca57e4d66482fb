# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice and cloze tasks from local JSONL files, scored by log-likelihood as lm-evaluation-harness does.

One item a line, UTF-8, ``id`` unique in the file. The keys of the first item say which kind the file holds:

- multiple choice: ``{"id", "context", "choices": [str], "label": int}``. Option i scores log P(" " + choice | context).
  With ``"contexts": [str]`` and ``"target": str`` beside them the options differ in the context instead (partial
  evaluation, as WinoGrande is scored): option i scores log P(" " + target | contexts[i]).
- cloze: ``{"id", "context", "target"}``. Right if greedy decoding of the context gives " " + target.

``acc`` takes the option of the largest log-likelihood, ``acc_norm`` that of the largest one per character of the
choice; ties go to the first.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.likelihood import Likelihood

NORMALISED = ("arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa")
"""Tasks whose usual figure is ``acc_norm``; every other one is compared by ``acc``."""

Pair = tuple[str, str]
Score = Callable[[Sequence[Pair]], list[Likelihood]]


@dataclass(frozen=True)
class Item:
    """One question. ``pairs``: context and continuation of every option, one pair for cloze. ``lengths``: characters of
    each choice. ``label``: index of the right option, None for cloze."""

    id: str
    pairs: tuple[Pair, ...]
    lengths: tuple[int, ...]
    label: int | None


@dataclass(frozen=True)
class Task:
    """``metric``: the one that is compared, ``acc`` or ``acc_norm``. ``available``: items in the file, of which
    ``items`` may be a sample. ``sha256``: of the file."""

    name: str
    kind: str
    metric: str
    items: tuple[Item, ...]
    available: int
    sha256: str


@dataclass(frozen=True)
class Answer:
    """What a model answered to one item. ``choice``: index of the option taken by the task's metric; for cloze 0 if
    greedy decoding gives the target, else -1. ``loglikelihoods``: of every option, natural log."""

    id: str
    acc: bool
    acc_norm: bool
    choice: int
    loglikelihoods: tuple[float, ...]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Answer:
        return cls(**found | {"loglikelihoods": tuple(found["loglikelihoods"])})


def load_task(path: Path | str, limit: int | None = None, seed: int = 0) -> Task:
    """Read a task file; its stem is the task's name. ``limit`` draws that many items, the same for the same ``seed``.

    Raises EvaluationError naming file and line if the file is missing or an item does not fit the schema.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"Task file {path} does not exist; a task NAME is read from NAME.jsonl in --data.")
    raw = path.read_bytes()
    rows = _rows(path, raw)
    kind = _kind(path, rows[0])
    parse = _multiple_choice if kind == "multiple_choice" else _cloze
    items = [_parsed(parse, path, number, row) for number, row in enumerate(rows, 1)]
    if len({item.id for item in items}) != len(items):
        raise EvaluationError(f"{path} gives the same id to several items; ids pair the answers of two models.")
    chosen = items
    if limit is not None and limit < len(items):
        chosen = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    metric = "acc_norm" if path.stem in NORMALISED else "acc"
    return Task(path.stem, kind, metric, tuple(chosen), len(items), hashlib.sha256(raw).hexdigest())


def _rows(path: Path, raw: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(raw.decode("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{path}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise EvaluationError(f"{path}, line {number}: not a JSON object.")
        rows.append(row)
    if not rows:
        raise EvaluationError(f"{path} holds no item.")
    return rows


def _kind(path: Path, row: dict[str, Any]) -> str:
    if "choices" in row:
        return "multiple_choice"
    if set(row) == {"id", "context", "target"}:
        return "cloze"
    raise EvaluationError(
        f"{path} has items with the keys {sorted(row)}. Known are multiple choice (id, context, choices, label; for "
        "partial evaluation also contexts, target) and cloze (exactly id, context, target); tasks that are judged on "
        "generated text, as GSM8K and HumanEval are, can't be scored by likelihood.")


def _parsed(parse: Callable[[dict[str, Any]], Item], path: Path, number: int, row: dict[str, Any]) -> Item:
    try:
        return parse(row)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks the key {error}" if isinstance(error, KeyError) else str(error)
        raise EvaluationError(f"{path}, item {number} ({row.get('id', 'without id')}): {reason}.") from None


def _multiple_choice(row: dict[str, Any]) -> Item:
    choices = [_text(choice, "choices") for choice in row["choices"]]
    label = row["label"]
    if len(choices) < 2 or not isinstance(label, int) or not 0 <= label < len(choices):
        raise ValueError(f"needs two choices or more and a label that counts them from 0; it has {len(choices)} and "
                         f"label {label!r}")
    if "contexts" in row:
        contexts = [_text(context, "contexts") for context in row["contexts"]]
        if len(contexts) != len(choices):
            raise ValueError(f"has {len(contexts)} contexts for {len(choices)} choices")
        target = _text(row["target"], "target")
        return Item(row["id"], tuple((c, " " + target) for c in contexts), (len(target),) * len(choices), label)
    context = _text(row["context"], "context")
    return Item(row["id"], tuple((context, " " + c) for c in choices), tuple(map(len, choices)), label)


def _cloze(row: dict[str, Any]) -> Item:
    target = _text(row["target"], "target")
    return Item(row["id"], ((_text(row["context"], "context"), " " + target),), (len(target),), None)


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or (not value and key != "context"):
        raise ValueError(f"{key} holds {value!r} where text is expected")
    return value


def answer_items(items: Sequence[Item], metric: str, score: Score) -> list[Answer]:
    """Answers in the order of ``items``; all their options go through ``score`` in one call."""
    found = iter(score([pair for item in items for pair in item.pairs]))
    return [_answer(item, metric, [next(found) for _ in item.pairs]) for item in items]


def _answer(item: Item, metric: str, options: list[Likelihood]) -> Answer:
    values = tuple(option.logprob for option in options)
    if item.label is None:
        right = options[0].greedy
        return Answer(item.id, right, right, 0 if right else -1, values)
    best = _argmax(values)
    best_norm = _argmax([value / length for value, length in zip(values, item.lengths, strict=True)])
    choice = best_norm if metric == "acc_norm" else best
    return Answer(item.id, best == item.label, best_norm == item.label, choice, values)


def _argmax(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
