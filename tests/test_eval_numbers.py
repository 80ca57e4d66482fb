# SPDX-License-Identifier: Apache-2.0
"""comet-eval's arithmetic: intervals, flips, the search for a rate, text similarity, recommendations."""

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.evaluate import cost, similarity, statistics
from calibrate.evaluate.cost import Load, UseCase
from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.recommend import recommendations
from calibrate.evaluate.serving import Timing
from calibrate.evaluate.similarity import shared_prefix
from calibrate.evaluate.tasks import Answer


def test_recovery_is_the_ratio_of_mean_scores_and_its_interval_covers_the_truth():
    """Of 200 experiments with a known recovery, about 95 % of the intervals hold it."""
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        base = (generator.random(400) < 0.6).astype(float)
        keeps = generator.random(400) < np.where(base == 1, 0.9, 0.05)  # right before: right in 90 % of cases
        drawn = statistics.draws([400], seed)
        found = statistics.recovery([base], [keeps.astype(float)], drawn)
        assert found.value == pytest.approx(100 * keeps.mean() / base.mean())
        covered += found.low <= 100 * (0.6 * 0.9 + 0.4 * 0.05) / 0.6 <= found.high
    assert 180 <= covered <= 199


def test_pairing_narrows_the_interval():
    base = np.tile([1.0, 0.0], 100)
    drawn = statistics.draws([200], 0)
    alike = statistics.recovery([base], [base.copy()], drawn)
    unlike = statistics.recovery([base], [base[::-1].copy()], drawn)
    assert (alike.low, alike.high) == (100, 100)
    assert unlike.value == 100 and unlike.high - unlike.low > 10


def test_recovery_of_nothing_is_undefined():
    assert statistics.recovery([np.zeros(5)], [np.ones(5)], statistics.draws([5], 0)) is None


def test_perplexity_ratio():
    base, other = np.array([2.0, 3.0, 2.5]), np.array([2.1, 3.1, 2.6])
    found = statistics.perplexity_ratio(base, other, statistics.draws([3], 0)[0])
    assert found.value == pytest.approx(math.exp(0.1))
    assert found.low == pytest.approx(found.high)  # every window grew by the same


def test_flips_count_changed_lost_and_gained():
    def answer(acc, choice):
        return Answer("x", acc, acc, choice, ())

    before = [answer(True, 0), answer(True, 0), answer(False, 1), answer(False, 1), answer(False, 1)]
    after = [answer(True, 0), answer(False, 1), answer(True, 0), answer(False, 2), answer(False, 1)]
    found = statistics.count_flips(before, after, "acc")
    assert (found.items, found.changed, found.lost, found.gained) == (5, 3, 1, 1)


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_shared_prefix_is_a_share_and_1_only_for_equal_answers(a, b):
    share = shared_prefix(a, b)
    assert 0 <= share <= 1 and (share == 1) == (a == b)
    common = sum(a[:end] == b[:end] for end in range(1, min(len(a), len(b)) + 1))
    assert not a and not b or share == common / max(len(a), len(b))


LOAD = Load(ttft=0.5, itl=0.05, queries=3, seconds=1.0, trials=20, vocabulary=100, seed=0)


@pytest.mark.parametrize("capacity", [0.3, 2.0, 7.3, 500.0])
def test_search_closes_in_on_the_capacity(capacity):
    async def trial(rate):
        return {"rate": rate, "meets": rate <= capacity}

    trials = asyncio.run(cost.search(1.0, LOAD, trial))
    best = max(t["rate"] for t in trials if t["meets"])
    assert capacity / cost.CLOSE_ENOUGH <= best <= capacity
    assert [t["rate"] for t in trials] == sorted(t["rate"] for t in trials)


def test_search_ends_where_no_rate_meets_the_limits():
    async def trial(rate):
        return {"rate": rate, "meets": False}

    assert len(asyncio.run(cost.search(1.0, LOAD, trial))) == LOAD.trials


class OneAtATime:
    """An engine that serves queries one after another, ``tokens`` · 1 ms each; so its capacity is known."""

    def __init__(self):
        self.lock, self.prompts = asyncio.Lock(), []

    async def request(self, prompt, tokens):
        self.prompts.append(prompt)
        begin = asyncio.get_running_loop().time()
        async with self.lock:
            first = asyncio.get_running_loop().time() - begin
            await asyncio.sleep(1e-3 * tokens)
        return Timing(first + 1e-3, 1e-3, asyncio.get_running_loop().time() - begin)


def test_measure_finds_latency_and_a_rate_below_capacity():
    engine = OneAtATime()
    load = Load(ttft=0.1, itl=0.05, queries=3, seconds=0.5, trials=6, vocabulary=100, seed=0)
    found = asyncio.run(cost.measure(engine, UseCase("chat", 6, 20), load))
    assert 0.02 <= found["sync"]["latency"] < 0.03
    assert found["rate"] is not None and found["rate"] < 60  # 50 queries/s at most, and a little for short trials
    assert {t["meets"] for t in found["trials"]} == {True, False}
    assert all(len(p) == 6 and max(p) < 100 for p in engine.prompts)
    assert len({tuple(p) for p in engine.prompts}) == len(engine.prompts)
    priced = cost.priced(found, price=3.6)
    assert priced["sync"]["per_dollar"] == pytest.approx(1000 / found["sync"]["latency"])
    assert priced["async"]["per_dollar"] == pytest.approx(1000 * found["rate"])


def test_use_cases_are_the_papers_and_scale():
    lengths = {c.name: (c.prompt, c.output) for c in cost.select_use_cases([], 1.0)}
    assert lengths == {"code-completion": (256, 1024), "docstring": (768, 128), "code-fixing": (1024, 1024),
                       "rag": (1024, 128), "instruction": (256, 128), "chat": (512, 256), "summarisation": (4096, 512)}
    [half] = cost.select_use_cases(["chat"], 0.5)
    assert (half.prompt, half.output) == (256, 128)
    with pytest.raises(EvaluationError, match="Unknown use cases poetry; known: code-completion"):
        cost.select_use_cases(["poetry"], 1.0)


def results(recovered: dict[str, float], per_dollar: dict[str, float | None], floor: float = 98.0) -> dict:
    """Results with one use case and the same cost both ways; ``base`` recovers 100 %."""
    def row(value):
        return {"perplexity": {}, "mean": {"recovery": {"value": value, "low": value - 1, "high": value + 1}}}

    return {
        "models": [{"label": label} for label in per_dollar], "settings": {"min_recovery": floor},
        "accuracy": {"base": row(100.0)} | {label: row(value) for label, value in recovered.items()},
        "cost": {label: {"chat": {way: {"per_dollar": value} for way in ("sync", "async")}}
                 for label, value in per_dollar.items()}}


@pytest.mark.parametrize("recovered, per_dollar, label, why", [
    ({"a": 99.5, "b": 90.0}, {"base": 10.0, "a": 20.0, "b": 40.0}, "a", "20 queries per dollar, 2.00× base's"),
    ({"a": 98.5}, {"base": 10.0, "a": 20.0}, "a", "not yet certain to be above 98 %"),
    ({"a": 98.5, "b": 99.5}, {"base": 10.0, "a": 20.0, "b": 19.8}, "b", "within 3% of a, and more accurate"),
    ({"a": 90.0}, {"base": 10.0, "a": 20.0}, "base", "a gives 2.00× the queries per dollar, but recovers 90.0 %"),
    ({"a": 99.9}, {"base": 10.0, "a": 8.0}, "base", "no candidate gives more"),
    ({"a": 99.9}, {"base": None, "a": 8.0}, "a", "where base misses the limits"),
    ({"a": 90.0}, {"base": None, "a": 8.0}, None, "no rate meets the limits"),
])
def test_recommendation_follows_from_cost_and_recovery(recovered, per_dollar, label, why):
    for entry in recommendations(results(recovered, per_dollar)):
        assert entry["label"] == label and why in entry["why"]


class Words:
    """A tokenizer whose tokens are indices into a list of words."""

    words = ("the", "cat", "sat", "on", "mat", "dog")

    def decode(self, tokens, skip_special_tokens):
        return " ".join(self.words[token] for token in tokens)


class Embedding:
    """Unit vectors: one axis for texts with a cat, another for the rest."""

    def encode(self, texts, normalize_embeddings):
        return np.array([[1.0, 0.0] if "cat" in text else [0.0, 1.0] for text in texts])


@pytest.mark.parametrize("model, semantic", [(None, None), (Embedding(), 0.5)])
def test_texts_are_compared_by_words_order_tokens_and_meaning(monkeypatch, model, semantic):
    monkeypatch.setattr(similarity, "embedding_model", lambda: model)
    base = [[0, 1, 2], [0, 1, 2, 3, 0, 4]]
    other = [[0, 1, 2], [3, 0, 4, 0, 5, 2]]  # "on the mat the dog sat" for "the cat sat on the mat"
    found = similarity.compare_texts(base, other, Words())
    assert found == {"prompts": 2, "rouge1": pytest.approx((1 + 5 / 6) / 2), "rougeL": pytest.approx((1 + 3 / 6) / 2),
                     "prefix": 0.5, "identical": 0.5, "semantic": semantic}
