# SPDX-License-Identifier: Apache-2.0
"""comet-eval's scores against a second implementation: one pair at a time, whole logits, nothing shared."""

import json

import pytest
import torch
from calibrate_tiny import save_tiny
from transformers import AutoTokenizer

from calibrate.evaluate.errors import EvaluationError
from calibrate.evaluate.likelihood import Likelihood, Request, TorchModel, encode_pairs
from calibrate.evaluate.tasks import answer_items, load_task
from calibrate.simulate import load_base

CHOICE_ITEMS = [
    {"id": "a", "context": "The sky is", "choices": ["blue", "a very long answer", "no"], "label": 0},
    {"id": "b", "context": "One and one make ", "choices": ["2", "3"], "label": 0},
    {"id": "c", "context": "", "choices": ["first", "second", "third", "fourth"], "label": 3},
    {"id": "d", "context": "Pick a letter.\nA. x\nB. y\nAnswer:", "choices": ["A", "B"], "label": 1},
]
PARTIAL_ITEMS = [{"id": "w", "context": "x", "choices": ["p", "q"], "target": "left.", "label": 1,
                  "contexts": ["Sam saw Al so Sam", "Sam saw Al so Al"]}]


@pytest.fixture(scope="module", params=["Llama", "Gemma3"])
def loaded(request, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / request.param, request.param)
    return load_base(folder), AutoTokenizer.from_pretrained(folder)


def naive_logprob(model, tokenizer, context, continuation) -> tuple[float, bool]:
    """Bytes are tokens in the tiny tokenizer, so any split of the text is a split of the tokens."""
    ids = tokenizer(context + continuation)["input_ids"]
    skip = len(tokenizer(context.rstrip(" "))["input_ids"])
    if skip == 0:
        ids, skip = [tokenizer.bos_token_id, *ids], 1
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    total, greedy = 0.0, True
    for position in range(skip, len(ids)):
        scores = torch.log_softmax(logits[position - 1], -1)
        total += float(scores[ids[position]])
        greedy &= int(scores.argmax()) == ids[position]
    return total, greedy


def naive_accuracy(model, tokenizer, rows) -> tuple[list[bool], list[bool]]:
    acc, acc_norm = [], []
    for row in rows:
        if "contexts" in row:
            pairs = [(context, " " + row["target"]) for context in row["contexts"]]
            lengths = [len(row["target"])] * len(pairs)
        else:
            pairs = [(row["context"], " " + choice) for choice in row["choices"]]
            lengths = [len(choice) for choice in row["choices"]]
        sums = torch.tensor([naive_logprob(model, tokenizer, *pair)[0] for pair in pairs])
        acc.append(int(sums.argmax()) == row["label"])
        acc_norm.append(int((sums / torch.tensor(lengths)).argmax()) == row["label"])
    return acc, acc_norm


def write_task(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_choices_agree_with_one_pair_at_a_time(loaded, tmp_path, batch_tokens):
    model, tokenizer = loaded
    rows = CHOICE_ITEMS + PARTIAL_ITEMS
    task = load_task(write_task(tmp_path / "arc_easy.jsonl", rows))
    answers = answer_items(task.items, task.metric, TorchModel(model, tokenizer, batch_tokens).score)
    acc, acc_norm = naive_accuracy(model, tokenizer, rows)
    assert [a.acc for a in answers] == acc and [a.acc_norm for a in answers] == acc_norm
    for item, answer in zip(task.items, answers, strict=True):
        for pair, value in zip(item.pairs, answer.loglikelihoods, strict=True):
            assert value == pytest.approx(naive_logprob(model, tokenizer, *pair)[0], abs=1e-3)


def test_a_continuation_is_greedy_only_if_decoding_gives_it(loaded):
    model, tokenizer = loaded
    context = tokenizer("Once upon a time", return_tensors="pt")
    decoded = model.generate(**context, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
    size = context["input_ids"].shape[1]
    wrong = [*decoded[size:-1], (decoded[-1] + 1) % 256]
    head = tuple(decoded[:size])
    continuations = [decoded[size:], wrong, decoded[size:-1]]
    found = TorchModel(model, tokenizer).score_tokens([Request(head, tuple(tail)) for tail in continuations])
    assert [one.greedy for one in found] == [True, False, True]


def test_cloze_task_counts_greedy_answers(tmp_path):
    rows = [{"id": "x", "context": "c", "target": "right"}, {"id": "y", "context": "c", "target": "wrong"}]
    task = load_task(write_task(tmp_path / "lambada.jsonl", rows))
    answers = answer_items(task.items, task.metric, lambda pairs: [Likelihood(-1.0, p[1] == " right") for p in pairs])
    assert [(a.acc, a.choice) for a in answers] == [(True, 0), (False, -1)]


def test_one_token_options_share_a_row(loaded):
    model, tokenizer = loaded
    calls = []
    handle = model.register_forward_pre_hook(lambda _m, args: calls.append(args[0].shape))
    try:
        found = TorchModel(model, tokenizer).score_tokens([Request((5, 6, 7), (8,)), Request((5, 6, 7), (9,)),
                                                           Request((5, 6, 7), (8, 4))])
    finally:
        handle.remove()
    assert calls == [torch.Size([2, 4])]
    assert found[0].logprob > found[2].logprob


def test_long_context_loses_its_oldest_tokens(loaded):
    _, tokenizer = loaded
    [request] = encode_pairs(tokenizer, [("0123456789", " ab")], max_length=6)
    assert len(request.context) + len(request.continuation) == 7
    assert tokenizer.decode(request.context) == "6789" and tokenizer.decode(request.continuation) == " ab"
    with pytest.raises(EvaluationError, match="3 tokens exceeds the model's 2"):
        encode_pairs(tokenizer, [("0123456789", " ab")], max_length=2)


@pytest.mark.parametrize("rows, message", [
    ([{"id": "a", "question": "?"}], "items with the keys"),
    ([{"id": "g", "context": "?", "target": "2", "final": "2"}], "generated text"),
    ([{"id": "a", "context": "?", "choices": ["x", "y"], "label": 2}], "label 2"),
    ([{"id": "a", "context": "?", "choices": ["x", "y"]}], "item 1 .a.: lacks the key 'label'"),
    ([{"id": "a", "context": "?", "choices": ["x", ""], "label": 0}], "choices holds ''"),
    ([{"id": "a", "context": "?", "target": "x"}] * 2, "same id"),
])
def test_a_file_that_does_not_fit_the_schema_is_refused(tmp_path, rows, message):
    with pytest.raises(EvaluationError, match=message):
        load_task(write_task(tmp_path / "task.jsonl", rows))


def test_missing_file_and_broken_json_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="nothing.jsonl does not exist"):
        load_task(tmp_path / "nothing.jsonl")
    (tmp_path / "broken.jsonl").write_text('{"id": "a", "context": "x", "target": "y"}\n{"id"\n')
    with pytest.raises(EvaluationError, match="broken.jsonl, line 2: not JSON"):
        load_task(tmp_path / "broken.jsonl")


def test_limit_draws_the_same_items_for_the_same_seed(tmp_path):
    path = write_task(tmp_path / "t.jsonl", [{"id": str(i), "context": "c", "target": "t"} for i in range(50)])
    drawn = [[item.id for item in load_task(path, 10, seed).items] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 10
    assert load_task(path, 10).available == 50 and load_task(path, 60).items == load_task(path).items
