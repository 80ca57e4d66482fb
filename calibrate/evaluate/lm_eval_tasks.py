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


def ask(model: Candidate, names: list[str], include: Path | None, limit: int | None, engine: dict[str, Any],
        cache: Cache, key: dict[str, Any]) -> list[tuple[Task, list[Answer]]]:
    """Each task in this package's terms (its items carry no text) with the model's answers.

    include: folder with task files of one's own (YAML). limit takes the first items, as lm-eval does. Few-shot settings
    are the task's. Exact matches count as ``acc``. An answer's ``choice`` is the likeliest option whatever the metric.
    """

    def run(wanted: list[str]) -> list[Any]:
        samples = _evaluate(model, wanted, include, limit, engine)
        return [_answers(name, samples[name]) for name in wanted]

    key = key | {"harness": "lm-eval", "limit": limit, "engine": engine}
    found = cache.answers(key, names, run, chunk=len(names))
    return [_task(PREFIX + name, one) for name, one in zip(names, found, strict=True)]


def _task(name: str, found: dict[str, Any]) -> tuple[Task, list[Answer]]:
    answers = [Answer.from_json(row) for row in found["answers"]]
    items = tuple(Item(answer.id, (), (), None) for answer in answers)
    return Task(name, "lm-eval", found["metric"], items, len(items), ""), answers


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


def _answers(name: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    metric = next((metric for metric in METRICS if metric in samples[0]), None)
    if metric is None:
        raise EvaluationError(f"lm-eval's task {name} has none of the metrics {', '.join(METRICS)}; its items can't be "
                              "compared.")
    rows = [asdict(_answer(sample, metric)) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return {"metric": "acc_norm" if metric == "acc_norm" else "acc", "answers": rows}


def _answer(sample: dict[str, Any], metric: str) -> Answer:
    options, right = sample["filtered_resps"], bool(sample[metric])
    values = tuple(float(option[0]) for option in options if isinstance(option, (list, tuple)))
    choice = max(range(len(values)), key=values.__getitem__) if len(values) > 1 else 0 if right else -1
    return Answer(str(sample["doc_id"]), bool(sample.get("acc", right)), right, choice, values)
