# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's samples as comet-eval's answers, without the harness."""

import pytest

from calibrate.evaluate import lm_eval_tasks
from calibrate.evaluate.cache import Cache
from calibrate.evaluate.errors import EvaluationError

SAMPLES = {
    "choice": [{"doc_id": 1, "acc": 0.0, "acc_norm": 1.0, "filtered_resps": [[-3.0, False], [-2.0, True]]},
               {"doc_id": 0, "acc": 1.0, "acc_norm": 1.0, "filtered_resps": [(-1.0, True), (-2.0, False)]}],
    "cloze": [{"doc_id": 0, "acc": 0, "perplexity": -4.0, "filtered_resps": [[-4.0, False]]}],
    "generated": [{"doc_id": 0, "exact_match": 1.0, "filtered_resps": ["42"]}],
    "other": [{"doc_id": 0, "bleu": 0.3, "filtered_resps": ["x"]}],
}


def ask(monkeypatch, tmp_path, *names):
    monkeypatch.setattr(lm_eval_tasks, "_evaluate", lambda model, wanted, *rest: {n: SAMPLES[n] for n in wanted})
    return {task.name: (task, answers) for task, answers in
            lm_eval_tasks.ask(None, list(names), None, None, {}, Cache(tmp_path), {})}


def test_samples_become_answers_in_the_order_of_the_documents(monkeypatch, tmp_path):
    found = ask(monkeypatch, tmp_path, "choice", "cloze", "generated")
    task, answers = found["lm-eval:choice"]
    assert task.metric == "acc_norm" and [item.id for item in task.items] == ["0", "1"]
    assert [(a.acc, a.acc_norm, a.choice, a.loglikelihoods) for a in answers] == [
        (True, True, 0, (-1.0, -2.0)), (False, True, 1, (-3.0, -2.0))]
    task, [answer] = found["lm-eval:cloze"]
    assert (task.metric, answer.acc, answer.choice) == ("acc", False, -1)
    task, [answer] = found["lm-eval:generated"]
    assert (task.metric, answer.acc, answer.choice) == ("acc", True, 0)


def test_a_metric_that_is_not_right_or_wrong_is_refused(monkeypatch, tmp_path):
    with pytest.raises(EvaluationError, match="task other has none of the metrics acc_norm, acc, exact_match"):
        ask(monkeypatch, tmp_path, "other")
