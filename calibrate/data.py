# SPDX-License-Identifier: Apache-2.0
"""Calibration text to token windows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.errors import CalibrationError

DEFAULT_TEXT = Path(__file__).with_name("default_text.txt")
_PAIRS = (("prompt", "response"), ("instruction", "output"), ("question", "answer"))


def load_text(path: Path | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a ``.txt`` or ``.jsonl`` file (or the shipped default), documents separated by blank lines.

    A JSON line holds ``text``, or chat ``messages`` (rendered with the chat template), or a known prompt/answer pair.
    """
    path = DEFAULT_TEXT if path is None else path
    if path.suffix not in (".txt", ".jsonl"):
        raise CalibrationError(f"--data {path}: the file must be .txt or .jsonl.")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"--data {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"--data {path} is not UTF-8: {error}.") from None
    if path.suffix == ".jsonl":
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        text = "\n\n".join(_document(line, f"--data {path}, line {number}", tokenizer) for number, line in lines)
    if not text.strip():
        raise CalibrationError(f"--data {path} is empty.")
    return text


def _document(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where} is not JSON: {error}.") from None
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("messages"), list):
            return tokenizer.apply_chat_template(row["messages"], tokenize=False)
        for first, second in _PAIRS:
            if first in row and second in row:
                return f"{row[first]}{row[second]}"
    raise CalibrationError(f"{where} has none of: text, messages, {', '.join('+'.join(p) for p in _PAIRS)}.")


def token_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, samples: int | None, length: int, seed: int, most: int
) -> torch.Tensor:
    """Disjoint windows ``[samples, length]`` int64 of the tokenised text, drawn with ``seed``.

    Each begins with BOS where the tokenizer adds one. ``samples`` None takes what there is, at most ``most``.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    probe = tokenizer("a")["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and probe[0] == tokenizer.bos_token_id else []
    body = length - len(bos)
    available = ids.numel() // body
    wanted = min(most, available) if samples is None else samples
    if available < max(wanted, 1):
        raise CalibrationError(f"the calibration text has {ids.numel()} tokens: {available} samples of {length}, "
                               f"{max(wanted, 1)} wanted. Give more text, or lower --samples or --length.")
    windows = ids[: available * body].view(available, body)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]
    prefix = torch.tensor(bos, dtype=torch.int64).expand(wanted, -1)
    return torch.cat([prefix, windows[order]], dim=1)
