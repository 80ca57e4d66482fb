# SPDX-License-Identifier: Apache-2.0
"""One evaluation from options to results: which questions, which answers, what they say beside the base's."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from calibrate.evaluate import accuracy, cost, environment, lm_eval_tasks
from calibrate.evaluate.accuracy import Answers, Asker, Questions
from calibrate.evaluate.backends import Backend, BackendOptions, open_backend
from calibrate.evaluate.cache import Cache
from calibrate.evaluate.candidates import Candidate, check_distinct, check_tokenizers, digest, parse_candidate
from calibrate.evaluate.cost import Load, UseCase
from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.recommend import recommendations
from calibrate.evaluate.serving import VllmEngine
from calibrate.evaluate.similarity import DEFAULT_PROMPTS, check_rouge, compare_texts, load_prompts
from calibrate.evaluate.tasks import Task, load_task


@dataclass(frozen=True)
class Options:
    """What ``comet-eval --help`` explains, with seconds for its milliseconds."""

    models: list[str]
    out: Path
    tasks: list[str] | None
    data: Path | None
    limit: int | None
    ppl: list[str]
    windows: int
    window_length: int
    prompts: Path | None
    prompt_limit: int | None
    answer_tokens: int
    backend: str
    device: str
    dtype: str
    serve: bool
    cost_only: bool
    use_cases: list[str]
    length_scale: float
    queries: int
    trial_seconds: float
    trials: int
    ttft: float
    itl: float
    gpu_price: float
    engine: dict[str, Any]
    min_recovery: float
    cache: Path | None
    seed: int


def say(line: str, where: str = "") -> None:
    print(f"comet-eval: {where}{line}", file=sys.stderr, flush=True)


def evaluate(options: Options) -> dict[str, Any]:
    """All numbers and settings of the report. The same options, checkpoints and cache give the same result."""
    with contextlib.ExitStack() as stack:
        models = [parse_candidate(text, stack) for text in options.models]
        _check(models, options)
        cache = Cache(options.cache or options.out / "cache")
        say("hashing the checkpoints")
        known = {directory: digest(directory) for directory in {model.directory for model in models}}
        hashes = {model.label: known[model.directory] for model in models}
        result = {"settings": _settings(options), "environment": environment.describe(),
                  "models": [_about(model, hashes[model.label], options) for model in models]}
        if not options.cost_only:
            result |= _accuracy(models, hashes, options, cache)
        if options.serve or options.cost_only:
            result["cost"] = _cost(models, hashes, options, cache)
    return result | {"recommendations": recommendations(result)}


def _check(models: list[Candidate], options: Options) -> None:
    """Raises EvaluationError for what would fail later, after hours."""
    check_distinct(models)
    if options.serve or options.cost_only or options.backend == "vllm":
        for model in models:
            model.engine_arguments()
        cost.select_use_cases(options.use_cases, options.length_scale)
    if options.cost_only:
        return
    if options.prompt_limit != 0:
        check_rouge()
    for model in models:
        model.check_backend(options.backend)
    check_tokenizers(models[0], models[1:])


def _settings(options: Options) -> dict[str, Any]:
    """Options without folders, which differ between machines and change no number."""
    kept = asdict(options) | {"prompts": options.prompts.name if options.prompts else "shipped with comet-eval",
                              "ppl": [Path(spec).name for spec in options.ppl]}
    return {name: value for name, value in kept.items() if name not in ("models", "out", "data", "cache")}


def _about(model: Candidate, checkpoint: str, options: Options) -> dict[str, Any]:
    harness_only = options.prompt_limit == 0 and not options.ppl and options.tasks is not None and all(
        name.startswith(lm_eval_tasks.PREFIX) for name in options.tasks)
    simulated = options.backend == "torch" and not options.cost_only and not harness_only
    return {"label": model.label, "mode": model.mode, "what": model.describe(simulated),
            "simulated": simulated and model.activations is not None, "sha256": checkpoint, "bytes": model.size()}


def _accuracy(models: list[Candidate], hashes: dict[str, str], options: Options, cache: Cache) -> dict[str, Any]:
    questions = _questions(models[0], options)
    answers = {}
    for number, model in enumerate(models, 1):
        report = functools.partial(say, where=f"[{number}/{len(models)}] {model.label}: ")
        answers[model.label], tasks = _answers(model, hashes[model.label], questions, options, cache, report)
    base = answers[models[0].label]
    tokenizer = models[0].tokenizer()
    found: dict[str, Any] = {
        "tasks": {task.name: _about_task(task) for task in tasks},
        "accuracy": {label: accuracy.compare(tasks, base, one, options.seed) for label, one in answers.items()}}
    if questions.prompts:
        say("comparing greedy answers")
        found["text"] = {model.label: compare_texts(base.texts, answers[model.label].texts, tokenizer)
                         for model in models[1:]}
    return found


def _questions(base: Candidate, options: Options) -> Questions:
    names = options.tasks
    if names is None:
        names = sorted(path.stem for path in options.data.glob("*.jsonl")) if options.data else []
    harness = [name for name in names if name.startswith(lm_eval_tasks.PREFIX)]
    lm_eval_tasks.check_installed(harness)
    tasks = [task for name in names if name not in harness and (task := _task(name, options))]
    texts = [accuracy.read_text(spec, base.directory, options.window_length, options.windows) for spec in options.ppl]
    prompts = load_prompts(options.prompts or DEFAULT_PROMPTS, base.tokenizer(), options.prompt_limit)
    return Questions(tasks, texts, prompts, options.answer_tokens,
                     [name.removeprefix(lm_eval_tasks.PREFIX) for name in harness])


def _task(name: str, options: Options) -> Task | None:
    """A task of --data. One that was not asked for by name is left out where it does not fit the schema."""
    if options.data is None:
        raise EvaluationError(f"Task {name} is read from {name}.jsonl; name its folder with --data.")
    try:
        return load_task(options.data / f"{name}.jsonl", options.limit, options.seed)
    except EvaluationError as error:
        if options.tasks is not None:
            raise
        say(f"skipped: {error}")
        return None


def _answers(model: Candidate, checkpoint: str, questions: Questions, options: Options, cache: Cache,
             report: Callable[[str], None]) -> tuple[Answers, list[Task]]:
    """What the model answered, and to which tasks."""
    longest = questions.longest(model.tokenizer()) if options.backend == "vllm" else 0
    backend = BackendOptions(options.backend, options.device, options.dtype, longest + 1, options.engine)
    key = {"checkpoint": checkpoint, "mode": model.mode}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def opened() -> Backend:
            report("loading")
            return stack.enter_context(open_backend(model, model.tokenizer(), backend))

        found = Asker(cache, key | backend.settings(), opened, report).ask(questions)
    if not questions.lm_eval:
        return found, questions.tasks
    harness = lm_eval_tasks.ask(model, questions.lm_eval, options.data, options.limit, options.engine, cache, key)
    found.tasks.update((task.name, answers) for task, answers in harness)
    return found, [*questions.tasks, *(task for task, _ in harness)]


def _about_task(task: Task) -> dict[str, Any]:
    options = [len(item.pairs) for item in task.items if item.label is not None]
    chance = sum(1 / n for n in options) / len(options) if options else None
    return {"kind": task.kind, "metric": task.metric, "items": len(task.items), "available": task.available,
            "sha256": task.sha256, "chance": chance}


def _cost(models: list[Candidate], hashes: dict[str, str], options: Options, cache: Cache) -> dict[str, Any]:
    """Measurements by label and use case, priced."""
    cases = cost.select_use_cases(options.use_cases, options.length_scale)
    found = {}
    for number, model in enumerate(models, 1):
        report = functools.partial(say, where=f"[{number}/{len(models)}] {model.label}: ")
        key = {"checkpoint": hashes[model.label], "mode": model.mode}
        measured = _serve(model, cases, options, cache, key, report)
        given = options.engine | model.engine_arguments()
        devices = int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
        found[model.label] = {case.name: cost.priced(one, options.gpu_price * devices)
                              for case, one in zip(cases, measured, strict=True)}
    return found


def _serve(model: Candidate, cases: list[UseCase], options: Options, cache: Cache, key: dict[str, Any],
           report: Callable[[str], None]) -> list[dict[str, Any]]:
    vocabulary = AutoConfig.from_pretrained(model.directory).get_text_config().vocab_size
    load = Load(options.ttft, options.itl, options.queries, options.trial_seconds, options.trials, vocabulary,
                options.seed)
    context = max(case.prompt + case.output for case in cases) + 8
    by_name = {case.name: case for case in cases}
    about = environment.describe()
    key |= {"engine": options.engine, "context": context, "load": asdict(load), "scale": options.length_scale,
            "device": about["device"], "versions": about["versions"]}
    with contextlib.ExitStack() as stack:

        @functools.cache
        def engine() -> VllmEngine:
            report("starting vLLM")
            gc.collect()
            torch.cuda.empty_cache()  # what models of the accuracy part left behind
            return stack.enter_context(VllmEngine(model, context, options.engine))

        def run(names: list[str]) -> list[Any]:
            report(f"serving {', '.join(names)}")
            return [engine().run(cost.measure(engine(), by_name[name], load)) for name in names]

        return cache.answers(key, list(by_name), run, chunk=1)
