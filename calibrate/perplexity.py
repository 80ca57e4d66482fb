# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a base model or a COMET checkpoint on a text: ``python -m calibrate.perplexity MODEL --text FILE``.

WikiText-2 is read the usual way: rows joined with two newlines, windows of 2048 tokens without overlap, each token but
a window's first predicted from those before it in the window.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from calibrate.simulate import load_base, load_comet


def join_wikitext_rows(text: str) -> str:
    """The raw WikiText file as its dataset rows joined with two newlines, the form published numbers use."""
    return "\n\n".join("" if not line.strip() else line + "\n" for line in text.split("\n")[:-1])


@torch.no_grad()
def window_losses(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of each row of ``windows`` ``[W, T]``, natural log, on the model's device."""
    device = next(model.parameters()).device
    batch, rows = (1, 256) if device.type == "cpu" else (8, 2048)
    losses: list[float] = []
    for ids in tqdm(windows.split(batch), unit="batch", leave=False, disable=None):
        ids = ids.to(device)
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        each = torch.cat([F.cross_entropy(model.lm_head(h).to(torch.float32), t, reduction="none")
                          for h, t in zip(hidden.split(rows), ids[:, 1:].flatten().split(rows), strict=True)])
        losses += each.view(len(ids), -1).to(torch.float64).mean(1).tolist()
    return losses


def text_windows(path: Path, tokenizer_dir: Path, length: int, count: int | None, joined: bool) -> torch.Tensor:
    """The first ``count`` windows ``[count, length]`` of the text (None: all), each with BOS first where the tokenizer
    adds one."""
    text = path.read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer(join_wikitext_rows(text) if joined else text, add_special_tokens=False, verbose=False)["input_ids"]
    starts_with_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    prefix = [tokenizer.bos_token_id] if starts_with_bos else []
    body = length - len(prefix)
    count = len(ids) // body if count is None else count
    if len(ids) < count * body:
        raise SystemExit(f"{path} has {len(ids)} tokens, too few for {count} windows of {length}.")
    return torch.tensor([prefix + ids[i * body : (i + 1) * body] for i in range(count)])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m calibrate.perplexity", description=__doc__)
    parser.add_argument("model", type=Path, help="Hugging Face folder or COMET checkpoint")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="take the text as it is, not as WikiText rows")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--activations", choices=("none", "int8", "mixed"), default="none")
    parser.add_argument("--kv4", action="store_true", help="4-bit KV cache")
    parser.add_argument("--base", action="store_true", help="MODEL is the unquantised model")
    args = parser.parse_args(argv)
    model = load_base(args.model) if args.base else load_comet(args.model, args.activations, args.kv4)
    windows = text_windows(args.text, args.model, args.length, args.windows, not args.plain)
    with torch.no_grad():
        losses = window_losses(model, windows)
    for count in sorted({min(4, args.windows), args.windows}):
        print(f"PPL, first {count} windows: {math.exp(sum(losses[:count]) / count):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
