# SPDX-License-Identifier: Apache-2.0
"""Recovery against the base model with its uncertainty, and flips, from the paired answers of two models.

The items of a task are a sample of what could have been asked. A paired bootstrap (Efron and Tibshirani 1993, ch. 13)
draws items with replacement, the same ones for both models, so what both find hard cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calibrate.evaluate.tasks import Answer

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """``value`` between ``low`` and ``high``, the ends of the 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Flips:
    """Items whose answer changed, and of those the ones right before (``lost``) and right after (``gained``)."""

    items: int
    changed: int
    lost: int
    gained: int


def draws(sizes: Sequence[int], seed: int) -> list[np.ndarray]:
    """For each task of ``sizes`` items: how often each is drawn in each resample, ``[RESAMPLES, items]``."""
    generator = np.random.default_rng(seed)
    return [generator.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in sizes]


def recovery(base: Sequence[np.ndarray], other: Sequence[np.ndarray], drawn: Sequence[np.ndarray]) -> Interval | None:
    """Mean score over tasks as % of the base's mean; None where the base scores nothing.

    base, other: one array of scores per task, item by item. drawn: from ``draws``, tasks resampled separately.
    """
    top, bottom = (float(np.mean([scores.mean() for scores in side])) for side in (other, base))
    if bottom == 0:
        return None
    tops, bottoms = (
        np.mean([counts @ scores / len(scores) for scores, counts in zip(side, drawn, strict=True)], axis=0)
        for side in (other, base))
    usable = bottoms > 0
    return Interval(100 * top / bottom, *_ends(100 * tops[usable] / bottoms[usable]))


def mean_interval(scores: np.ndarray, drawn: np.ndarray) -> Interval:
    """Mean of ``scores`` with its interval."""
    return Interval(float(scores.mean()), *_ends(drawn @ scores / len(scores)))


def perplexity_ratio(base: np.ndarray, other: np.ndarray, drawn: np.ndarray) -> Interval:
    """Perplexity of ``other`` over that of ``base`` from the mean losses of the same windows, each ``[W]``."""
    change = other - base
    low, high = _ends(drawn @ change / len(change))
    return Interval(math.exp(float(change.mean())), math.exp(low), math.exp(high))


def _ends(samples: np.ndarray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(samples, tail)), float(np.quantile(samples, 1 - tail))


def count_flips(base: Sequence[Answer], other: Sequence[Answer], metric: str) -> Flips:
    before, after = ([getattr(answer, metric) for answer in side] for side in (base, other))
    pairs = list(zip(before, after, strict=True))
    changed = sum(a.choice != b.choice for a, b in zip(base, other, strict=True))
    return Flips(len(pairs), changed, sum(b and not a for b, a in pairs), sum(a and not b for b, a in pairs))
