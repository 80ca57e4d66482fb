# SPDX-License-Identifier: Apache-2.0
"""Log-likelihoods of continuations under a causal language model: the tokens of a pair, and torch batches of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.evaluate.errors import EvaluationError

logger = logging.getLogger(__name__)

MAX_LOGITS = 2**28
"""Elements of one batch's logits: 1 GiB in float32."""


class Likelihood(NamedTuple):
    """``logprob``: natural log of P(continuation | context). ``greedy``: every token of it is the likeliest one."""

    logprob: float
    greedy: bool


class Request(NamedTuple):
    """Token ids. ``continuation`` is scored after ``context``; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token if the tokenizer starts a text with it, else nothing."""
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int | None = None
) -> list[Request]:
    """Tokens of (context, continuation) texts, split where lm-evaluation-harness splits them.

    Context and continuation are encoded together and the tokens of the context alone are taken off the front, so a
    continuation has the tokens it has in running text; spaces that end the context go to the continuation. An empty
    context becomes BOS (EOS without one). Contexts lose their oldest tokens where a pair exceeds ``max_length`` + 1.
    """
    prefix = bos_prefix(tokenizer)
    start = prefix or [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    bare = [context.rstrip() for context, _ in pairs]
    unique = {text: i for i, text in enumerate(dict.fromkeys(bare))}
    encoded = _encode(tokenizer, list(unique))
    whole = _encode(tokenizer, [context + continuation for context, continuation in pairs])
    requests = []
    for (context, continuation), text, ids in zip(pairs, bare, whole, strict=True):
        front = encoded[unique[text]]
        tail = tuple(ids[len(front):])
        if not tail:
            raise EvaluationError(f"{continuation!r} adds no token to the context {context[-40:]!r}.")
        requests.append(Request(tuple(prefix + front) or tuple(start), tail))
    return requests if max_length is None else _shorten(requests, max_length)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _shorten(requests: list[Request], max_length: int) -> list[Request]:
    result = []
    for context, continuation in requests:
        room = max_length + 1 - len(continuation)
        if room < 1:
            raise EvaluationError(f"A continuation of {len(continuation)} tokens exceeds the model's {max_length}.")
        result.append(Request(context[-room:], continuation))
    cut = sum(short != whole for short, whole in zip(result, requests, strict=True))
    if cut:
        logger.warning("%d of %d contexts lost their first tokens: the model takes %d.", cut, len(requests), max_length)
    return result


@dataclass(frozen=True)
class _Row:
    """One input of the model and all continuations read from it: ``(request index, first position, tokens)``."""

    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int, tuple[int, ...]], ...]

    @property
    def targets(self) -> int:
        return sum(len(tokens) for _, _, tokens in self.spans)


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """Requests whose input is the same share a row: one-token options (letters, yes and no) cost one context."""
    spans: dict[tuple[int, ...], list[tuple[int, int, tuple[int, ...]]]] = {}
    for index, (context, continuation) in enumerate(requests):
        found = spans.setdefault(context + continuation[:-1], [])
        found.append((index, len(context) - 1, continuation))
    return [_Row(tokens, tuple(found)) for tokens, found in spans.items()]


def _batches(rows: list[_Row], batch_tokens: int, max_targets: int) -> Iterator[list[_Row]]:
    """Longest rows first, so that a batch holds little padding and memory is at its peak at once."""
    batch: list[_Row] = []
    targets = 0
    for row in sorted(rows, key=lambda row: (-len(row.tokens), row.tokens)):
        width = len(batch[0].tokens) if batch else 0
        if batch and (width * (len(batch) + 1) > batch_tokens or targets + row.targets > max_targets):
            yield batch
            batch, targets = [], 0
        batch.append(row)
        targets += row.targets
    if batch:
        yield batch


class TorchModel:
    """A causal LM of transformers with its tokenizer, on one device, as a scorer.

    batch_tokens: padded input tokens of a batch (default: 2,048 on a CPU, 32,768 on a GPU).
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int | None = None
    ):
        self.model, self.tokenizer = model, tokenizer
        self.device = next(model.parameters()).device
        self.batch_tokens = batch_tokens or (2048 if self.device.type == "cpu" else 32768)
        self.max_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.head = model.get_output_embeddings()

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Log-likelihood of every pair's continuation, in the order given."""
        return self.score_tokens(encode_pairs(self.tokenizer, pairs, self.max_length))

    @torch.inference_mode()
    def score_tokens(self, requests: Sequence[Request]) -> list[Likelihood]:
        vocabulary = self.model.config.get_text_config().vocab_size
        rows = _rows(requests)
        order, values, hits = [], [], []
        batches = list(_batches(rows, self.batch_tokens, MAX_LOGITS // vocabulary))
        for batch in tqdm(batches, unit="batch", leave=False, disable=None):
            logprobs, greedy = self._forward(batch)
            values.append(logprobs)
            hits.append(greedy)
            order += [(index, len(tokens)) for row in batch for index, _, tokens in row.spans]
        ends = torch.tensor([0] + [length for _, length in order]).cumsum(0).tolist()
        logprob, greedy = torch.cat(values).cpu().double(), torch.cat(hits).cpu()  # one wait for the device
        result: list[Any] = [None] * len(requests)
        for (index, _), (begin, end) in zip(order, pairwise(ends), strict=True):
            result[index] = Likelihood(float(logprob[begin:end].sum()), bool(greedy[begin:end].all()))
        return result

    def _forward(self, batch: list[_Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 log-probability of every target token of the batch ``[P]``, and whether it is the likeliest.

        Padding is on the right, where causal attention never looks, so no mask is needed. The output layer sees the
        P hidden states that are asked for, not all of the batch.
        """
        tokens = pad_sequence([torch.tensor(row.tokens) for row in batch], batch_first=True).to(self.device)
        spans = [(i * tokens.shape[1] + start, target) for i, row in enumerate(batch) for _, start, target in row.spans]
        positions = torch.cat([torch.arange(at, at + len(target)) for at, target in spans]).to(self.device)
        targets = torch.tensor([token for _, target in spans for token in target]).to(self.device)

        def select(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (inputs[0].flatten(0, 1)[positions].unsqueeze(0),)

        hook = self.head.register_forward_pre_hook(select)
        try:
            logits = self.model(tokens, use_cache=False).logits[0].to(torch.float32)
        finally:
            hook.remove()
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
        return logprobs, logits.argmax(-1) == targets
