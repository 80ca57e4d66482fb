# SPDX-License-Identifier: Apache-2.0
"""Answers of one model to tasks, perplexity windows and prompts, by way of the cache, and their comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.evaluate import statistics
from calibrate.evaluate.backends import Backend
from calibrate.evaluate.cache import Cache, hash_of
from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.likelihood import Request, encode_pairs
from calibrate.evaluate.statistics import Interval
from calibrate.evaluate.tasks import Answer, Task, answer_items
from calibrate.perplexity import text_windows

CHUNK = 128
"""Items between two writes of the cache."""


@dataclass(frozen=True)
class Text:
    """A perplexity text cut into ``windows`` ``[W, T]`` of token ids. ``joined``: lines were read as WikiText rows."""

    name: str
    windows: torch.Tensor
    joined: bool
    sha256: str


@dataclass(frozen=True)
class Answers:
    """What one model said: answers per task, mean loss of every window per text, generated tokens per prompt."""

    tasks: dict[str, list[Answer]]
    losses: dict[str, np.ndarray]
    texts: list[list[int]]


@dataclass(frozen=True)
class Questions:
    """``prompts``: name and token ids; ``answer_tokens``: most tokens of a greedy answer. ``lm_eval``: names of
    lm-evaluation-harness's tasks, which it asks itself."""

    tasks: list[Task]
    texts: list[Text]
    prompts: list[tuple[str, list[int]]]
    answer_tokens: int
    lm_eval: list[str]

    def longest(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """Tokens of the longest question with its answer."""
        pairs = [pair for task in self.tasks for item in task.items for pair in item.pairs]
        requests = encode_pairs(tokenizer, pairs)
        return max([1, *(len(request.context) + len(request.continuation) for request in requests),
                    *(text.windows.shape[1] for text in self.texts),
                    *(len(tokens) + self.answer_tokens for _, tokens in self.prompts)])


def read_text(spec: str, tokenizer_dir: Path, length: int, count: int) -> Text:
    """``[wikitext:]FILE``: the prefix joins the rows of a raw WikiText file the way published numbers do."""
    path = Path(spec.removeprefix("wikitext:"))
    if not path.is_file():
        raise EvaluationError(f"--ppl {spec}: {path} does not exist; write FILE or wikitext:FILE.")
    joined = spec.startswith("wikitext:")
    windows = text_windows(path, tokenizer_dir, length, count, joined)
    return Text(path.stem, windows, joined, hashlib.sha256(path.read_bytes()).hexdigest())


class Asker:
    """Puts questions to one model, of which the cache answers what it can.

    key: the model's checkpoint, mode and backend. opened: loads the model at the first question that needs it.
    """

    def __init__(self, cache: Cache, key: dict[str, Any], opened: Callable[[], Backend], say: Callable[[str], None]):
        self.cache, self.key, self.opened, self.say = cache, key, opened, say

    def ask(self, questions: Questions) -> Answers:
        prompts = self._prompts(questions.prompts, questions.answer_tokens) if questions.prompts else []
        return Answers({task.name: self._task(task) for task in questions.tasks},
                       {text.name: self._text(text) for text in questions.texts}, prompts)

    def _task(self, task: Task) -> list[Answer]:
        items = {item.id: item for item in task.items}

        def run(ids: list[str]) -> list[Any]:
            self.say(f"{task.name}: {len(ids)} items")
            found = answer_items([items[i] for i in ids], task.metric, self.opened().score)
            return [asdict(answer) for answer in found]

        key = self.key | {"task": task.name, "file": task.sha256, "metric": task.metric}
        return [Answer.from_json(found) for found in self.cache.answers(key, list(items), run, CHUNK)]

    def _text(self, text: Text) -> np.ndarray:
        count, length = text.windows.shape

        def run(indices: list[str]) -> list[float]:
            self.say(f"perplexity of {text.name}: {len(indices)} windows of {length}")
            rows = [text.windows[int(i)].tolist() for i in indices]
            found = self.opened().score_tokens([Request((row[0],), tuple(row[1:])) for row in rows])
            return [-one.logprob / (length - 1) for one in found]

        key = self.key | {"text": text.name, "file": text.sha256, "joined": text.joined, "length": length}
        return np.array(self.cache.answers(key, [str(i) for i in range(count)], run, chunk=4))

    def _prompts(self, prompts: list[tuple[str, list[int]]], tokens: int) -> list[list[int]]:
        by_name = {f"{name} {hash_of(ids)[:12]}": ids for name, ids in prompts}

        def run(names: list[str]) -> list[list[int]]:
            self.say(f"greedy answers to {len(names)} prompts, {tokens} tokens")
            return self.opened().generate([by_name[name] for name in names], tokens)

        return self.cache.answers(self.key | {"tokens": tokens}, list(by_name), run, chunk=16)


def compare(tasks: Sequence[Task], base: Answers, other: Answers, seed: int) -> dict[str, Any]:
    """Scores, recovery, flips and perplexity of ``other`` beside ``base``, as JSON."""
    drawn = dict(zip([t.name for t in tasks], statistics.draws([len(t.items) for t in tasks], seed), strict=True))
    before = {t.name: _scores(base.tasks[t.name], t.metric) for t in tasks}
    after = {t.name: _scores(other.tasks[t.name], t.metric) for t in tasks}
    rows = {}
    for task in tasks:
        name = task.name
        rows[name] = {
            "metric": task.metric,
            **{metric: float(_scores(other.tasks[name], metric).mean()) for metric in ("acc", "acc_norm")},
            "interval": _json(statistics.mean_interval(after[name], drawn[name])),
            "recovery": _json(statistics.recovery([before[name]], [after[name]], [drawn[name]])),
            "flips": asdict(statistics.count_flips(base.tasks[name], other.tasks[name], task.metric)),
        }
    return {"tasks": rows, "mean": _mean(before, after, drawn) if tasks else None,
            "perplexity": _perplexities(base, other, seed)}


def _mean(before: dict[str, np.ndarray], after: dict[str, np.ndarray], drawn: dict[str, np.ndarray]) -> dict[str, Any]:
    names = list(before)
    interval = statistics.recovery([before[n] for n in names], [after[n] for n in names], [drawn[n] for n in names])
    return {"score": float(np.mean([after[n].mean() for n in names])), "recovery": _json(interval)}


def _perplexities(base: Answers, other: Answers, seed: int) -> dict[str, Any]:
    found = {}
    for name, losses in other.losses.items():
        ratio = statistics.perplexity_ratio(base.losses[name], losses, statistics.draws([len(losses)], seed)[0])
        found[name] = {"perplexity": float(np.exp(losses.mean())), "windows": len(losses), "over_base": _json(ratio)}
    return found


def _scores(answers: Sequence[Answer], metric: str) -> np.ndarray:
    return np.array([getattr(answer, metric) for answer in answers], dtype=float)


def _json(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)
