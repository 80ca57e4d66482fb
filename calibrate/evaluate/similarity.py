# SPDX-License-Identifier: Apache-2.0
"""How far the greedy answers of two models to the same prompts are apart: words, order of words, tokens, meaning."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.evaluate.errors import EvaluationError

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def load_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> list[tuple[str, list[int]]]:
    """Name and token ids of every prompt of a JSONL file, in the tokenizer's chat template if it has one.

    A line holds ``id`` (default: its number) and ``prompt``, or ``turns`` (the first is asked), or ``messages``.
    """
    if not path.is_file():
        raise EvaluationError(f"Prompt file {path} does not exist.")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                prompts.append((str(row.get("id", number)), _encode(tokenizer, _messages(row))))
            except (ValueError, KeyError, AttributeError):
                raise EvaluationError(f"{path}, line {number}: needs a JSON object with prompt, turns or messages."
                                      ) from None
    if len(dict(prompts)) != len(prompts):
        raise EvaluationError(f"{path} gives the same id to several prompts.")
    return prompts[:limit]


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["turns"][0] if "turns" in row else row["prompt"]}]


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_rouge() -> None:
    """Raises EvaluationError if texts can't be compared."""
    if importlib.util.find_spec("rouge_score") is None:
        raise EvaluationError("Comparing texts needs rouge-score: pip install 'vllm-comet[eval]', or --prompt-limit 0.")


def compare_texts(
    base: Sequence[list[int]], other: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Means over prompts, each between 0 and 1.

    ``rouge1``, ``rougeL``: F-measures of rouge-score, ROUGE-L being the structural similarity of "Give Me BF16 or Give
    Me Death?". ``prefix``: share of the longer answer's tokens before the first that differs. ``identical``: share of
    answers without a difference. ``semantic``: cosine of sentence embeddings, None without an embedding model.
    """
    from rouge_score.rouge_scorer import RougeScorer

    texts = [[tokenizer.decode(tokens, skip_special_tokens=True) for tokens in side] for side in (base, other)]
    scorer = RougeScorer(["rouge1", "rougeL"])
    rouge = [scorer.score(before, after) for before, after in zip(*texts, strict=True)]
    same = [a == b for a, b in zip(base, other, strict=True)]
    return {
        "prompts": len(same),
        "rouge1": fmean(1.0 if equal else one["rouge1"].fmeasure for one, equal in zip(rouge, same, strict=True)),
        "rougeL": fmean(1.0 if equal else one["rougeL"].fmeasure for one, equal in zip(rouge, same, strict=True)),
        "prefix": fmean(shared_prefix(a, b) for a, b in zip(base, other, strict=True)),
        "identical": fmean(same),
        "semantic": _semantic(*texts),
    }


def shared_prefix(a: list[int], b: list[int]) -> float:
    """Length of the common beginning over that of the longer sequence; 1 for two empty ones."""
    longest = max(len(a), len(b))
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return common / longest if longest else 1.0


def _semantic(base: list[str], other: list[str]) -> float | None:
    model = embedding_model()
    if model is None:
        return None
    left, right = (model.encode(side, normalize_embeddings=True) for side in (base, other))
    return float((left * right).sum(axis=1).mean())


@functools.cache
def embedding_model() -> Any:
    """MiniLM if sentence-transformers and the model are on this machine, else None; nothing is downloaded."""
    try:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(EMBEDDING_MODEL, local_files_only=True)
    except (ImportError, OSError):
        return None
