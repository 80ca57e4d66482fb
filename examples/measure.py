# SPDX-License-Identifier: Apache-2.0
"""What the accuracy scripts share: one evaluator for every model, and the header of a results file."""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tables import RESULTS
from transformers import PreTrainedModel

from calibrate.evaluate.likelihood import TorchModel
from calibrate.evaluate.tasks import answer_items, load_task
from calibrate.loading import ModelSource
from calibrate.perplexity import text_windows, window_losses

TASKS = ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa", "boolq", "winogrande", "mmlu",
         "truthfulqa_mc1")
LENGTH = 2048


class Evaluator:
    """Perplexity on WikiText rows, and accuracy on the zero-shot tasks of a folder.

    source: the unquantised model, for its tokenizer. windows: how many of 2048 tokens, None for all of the text.
    """

    def __init__(self, source: ModelSource, text: Path, windows: int | None, tasks: Path | None):
        self.tokenizer = source.tokenizer()
        self.windows = text_windows(text, source.directory, LENGTH, windows, joined=True)
        self.tasks = [load_task(tasks / f"{name}.jsonl") for name in TASKS] if tasks else []

    def perplexity(self, model: PreTrainedModel) -> dict[str, float]:
        """By number of windows, the first 20 and all."""
        losses = window_losses(model, self.windows)
        counts = sorted({min(20, len(losses)), len(losses)})
        return {str(n): round(math.exp(sum(losses[:n]) / n), 3) for n in counts}

    def zeroshot(self, model: PreTrainedModel) -> dict[str, Any]:
        """``zeroshot``: accuracy of each task by its usual metric; ``zeroshot_mean``: their mean."""
        if not self.tasks:
            return {}
        scorer = TorchModel(model, self.tokenizer)
        scores = {}
        for task in self.tasks:
            answers = answer_items(task.items, task.metric, scorer.score)
            scores[task.name] = round(sum(getattr(a, task.metric) for a in answers) / len(answers), 4)
        return {"zeroshot": scores, "zeroshot_mean": round(sum(scores.values()) / len(scores), 4)}

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        return {"ppl": self.perplexity(model), **self.zeroshot(model)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2 raw test set")
    parser.add_argument("--windows", type=int, help="of 2048 tokens (default: all of the text)")
    parser.add_argument("--tasks", type=Path, help="folder of zero-shot tasks, see calibrate/evaluate/tasks.py")
    parser.add_argument("--name", required=True, help="of the model, in the results")
    parser.add_argument("--commit", help="what was measured, where there is no git to ask")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def header(name: str, commit: str | None) -> dict[str, Any]:
    """Name, device, versions, commit and command of this run; paths are cut to their last part."""
    words = [Path(sys.argv[0]).name, *(Path(word).name if "/" in word else word for word in sys.argv[1:])]
    gpu = torch.cuda.is_available()
    return {
        "name": name,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit or _commit(),
        "command": f"python examples/{shlex.join(words)}",
    }


def _commit() -> str | None:
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def save(kind: str, result: dict[str, Any], out: Path | None = None) -> Path:
    """Write ``kind-name.json`` into examples/results."""
    path = (out or RESULTS) / f"{kind}-{result['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
