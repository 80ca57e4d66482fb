# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness (``--tasks lm-eval:NAME``), run by it through its vLLM backend, if it is installed."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibrate.evaluate.cache import Cache
from calibrate.evaluate.candidates import Candidate
from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.tasks import Answer, Item, Task

PREFIX = "lm-eval:"
METRICS = ("acc_norm", "acc", "exact_match")
"""Metrics of one item that are 0 or 1, the one to compare first."""


def check_installed(names: list[str]) -> None:
    """Raises EvaluationError if tasks are asked of a harness that is not there."""
    if names and importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(f"{PREFIX}{names[0]} needs lm-evaluation-harness: pip install 'lm-eval'.")


def answers(model: Candidate, names: list[str], include: Path | None, limit: int | None, engine: dict[str, Any],
            cache: Cache, key: dict[str, Any]) -> dict[str, list[Answer]]:
    """Answers by the task's name with the prefix. ``include``: folder with task files of one's own (YAML). ``limit``
    takes the first items, as lm-eval does. Few-shot settings are the task's."""

    def run(wanted: list[str]) -> list[Any]:
        samples = _evaluate(model, wanted, include, limit, engine)
        return [[asdict(_answer(sample)) for sample in samples[name]] for name in wanted]

    key = key | {"harness": "lm-eval", "limit": limit, "engine": engine}
    found = cache.answers(key, names, run, chunk=len(names))
    return {PREFIX + name: [Answer.from_json(row) for row in rows]
            for name, rows in zip(names, found, strict=True)}


def as_tasks(names: list[str], asked: dict[str, list[Answer]]) -> list[Task]:
    """Tasks in this package's terms; their items carry no text. Answers hold the metric to compare as ``acc_norm``."""
    return [Task(PREFIX + name, "lm-eval", "acc_norm", tuple(Item(a.id, (), (), None) for a in asked[PREFIX + name]),
                 len(asked[PREFIX + name]), "") for name in names]


def _evaluate(model: Candidate, names: list[str], include: Path | None, limit: int | None,
              engine: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = engine | model.engine_arguments()
    arguments["pretrained"] = arguments.pop("model")
    found = simple_evaluate(model="vllm", model_args=arguments, tasks=names, limit=limit, bootstrap_iters=0,
                            task_manager=TaskManager(include_path=include), log_samples=True)
    missing = [name for name in names if name not in found["samples"]]
    if missing:
        raise EvaluationError(f"lm-eval gave no items for {', '.join(missing)}; name single tasks, not groups.")
    return found["samples"]


def _answer(sample: dict[str, Any]) -> Answer:
    metric = next((name for name in METRICS if name in sample), None)
    if metric is None:
        raise EvaluationError(f"An lm-eval task has none of the metrics {', '.join(METRICS)}; its items can't be "
                              "compared.")
    options = sample["filtered_resps"]
    if isinstance(options[0], (list, tuple)):
        values = tuple(float(option[0]) for option in options)
        choice = max(range(len(values)), key=values.__getitem__)
    else:
        values, choice = (), 0 if sample[metric] else -1
    return Answer(str(sample["doc_id"]), bool(sample.get("acc", sample[metric])), bool(sample[metric]), choice, values)
