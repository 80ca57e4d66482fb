# SPDX-License-Identifier: Apache-2.0
"""comet-eval from the command line to the report's files, on tiny checkpoints."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from calibrate_tiny import save_tiny, write_text
from transformers import AutoTokenizer

from calibrate.__main__ import main as calibrate
from calibrate.evaluate import run
from calibrate.evaluate.__main__ import command, main
from calibrate.evaluate.backends import TorchBackend
from calibrate.perplexity import text_windows, window_losses
from calibrate.simulate import greedy, load_base, load_comet

VOID = {"meta", "br", "line", "circle", "rect", "path"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bf16 model, its COMET checkpoint, two task files and a text."""
    folder = tmp_path_factory.mktemp("eval")
    text = write_text(folder / "text.txt")
    base = save_tiny(folder / "base", "Llama")
    assert calibrate([str(base), "--out", str(folder / "comet"), "--data", str(text), "--samples", "8", "--length",
                      "64"]) == 0
    rows = {"piqa": [{"id": f"p/{i}", "context": f"Number {i} is", "choices": ["even", "odd"], "label": i % 2}
                     for i in range(12)],
            "lambada": [{"id": f"l/{i}", "context": "abc " * i, "target": "abc"} for i in range(6)]}
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def evaluate(folder, out, *options, tasks="piqa,lambada"):
    models = [f"bf16={folder / 'base'}", f"W4A8={folder / 'comet'}", f"mixed={folder / 'comet'}@mixed"]
    return main([*models, "--tasks", tasks, "--data", str(folder), "--ppl", str(folder / "text.txt"), "--windows", "3",
                 "--window-length", "64", "--prompt-limit", "3", "--answer-tokens", "6", "--out", str(out), *options])


def test_same_seed_same_report_and_numbers_that_agree_with_the_parts(folder, tmp_path):
    first, second = tmp_path / "a" / "report", tmp_path / "b" / "report"
    assert evaluate(folder, first) == 0 and evaluate(folder, second) == 0
    for name in ("report.json", "report.md", "report.html"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    found = json.loads((first / "report.json").read_text())
    assert str(folder) not in json.dumps(found) and " bf16=base W4A8=comet mixed=comet@mixed " in found["command"]
    windows = text_windows(folder / "text.txt", folder / "base", 64, 3, joined=False)
    models = {"bf16": load_base(folder / "base"), "W4A8": load_comet(folder / "comet"),
              "mixed": load_comet(folder / "comet", "mixed")}
    for label, model in models.items():
        losses = window_losses(model, windows)
        perplexity = found["accuracy"][label]["perplexity"]["text"]
        bound = 1e-5 if label == "bf16" else 1e-4  # sums in another order may turn a code
        assert perplexity["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=bound)
    assert found["accuracy"]["bf16"]["mean"]["recovery"] == pytest.approx({"value": 100, "low": 100, "high": 100})
    assert [m["simulated"] for m in found["models"]] == [False, True, True]
    assert found["tasks"]["piqa"]["metric"] == "acc_norm" and found["tasks"]["lambada"]["metric"] == "acc"


def test_an_interrupted_run_goes_on_and_a_finished_one_loads_no_model(folder, tmp_path, monkeypatch, capsys):
    score, calls = TorchBackend.score, []

    def interrupted(self, pairs):
        calls.append(len(pairs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, pairs)

    monkeypatch.setattr(TorchBackend, "score", interrupted)
    assert evaluate(folder, tmp_path) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert evaluate(folder, tmp_path) == 0
    assert calls == [24, 6, 24, 24, 6, 24, 6]  # the base's two tasks once, the task that was cut short again
    monkeypatch.setattr(run, "open_backend", None)
    report = (tmp_path / "report.json").read_bytes()
    assert evaluate(folder, tmp_path) == 0 and (tmp_path / "report.json").read_bytes() == report


def test_what_would_fail_after_hours_is_refused_at_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "open_backend", None)
    base, comet = f"bf16={folder / 'base'}", folder / "comet"
    for models, options, message in [
            ([base, f"{comet}@weights"], ["--serve"], "@weights is for simulation only"),
            ([base, str(comet)], ["--serve", "--use-cases", "poetry"], "Unknown use cases poetry"),
            ([base, str(comet)], ["--tasks", "lm-eval:nothing"], "pip install 'lm-eval'"),
            ([base, str(comet)], ["--tasks", "piqa"], "name its folder with --data")]:
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert main([*models, *options, "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("tasks, message", [
    ("nothing", r"nothing\.jsonl does not exist; a task NAME is read from NAME\.jsonl in --data"),
    ("text", r"text\.jsonl does not exist"),
])
def test_refusals_are_one_line(folder, tmp_path, capsys, tasks, message):
    assert evaluate(folder, tmp_path, tasks=tasks) == 1
    assert re.search(f"^comet-eval: error: .*{message}", capsys.readouterr().err, re.MULTILINE)


def test_batched_greedy_answers_equal_those_one_at_a_time(folder):
    model, tokenizer = load_base(folder / "base"), AutoTokenizer.from_pretrained(folder / "base")
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    prompts = [tokenizer(text)["input_ids"] for text in ("a", "a longer prompt", "and one that is longer still")]
    assert TorchBackend(model, tokenizer).generate(prompts, 8) == [greedy(model, p, 8)[0] for p in prompts]
    answer = greedy(model, prompts[1], 8)[0]
    model.generation_config.eos_token_id = answer[3]
    assert TorchBackend(model, tokenizer).generate(prompts, 8)[1] == answer[:answer.index(answer[3])]


class Outline(HTMLParser):
    """Open elements, and every address the page mentions."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def fake_cost(label):
    speed = {"bf16": 1.0, "W4A8": 2.0, "mixed": 1.5}[label]
    trials = [{"rate": r * speed, "queries": 8, "ttft_mean": 0.1, "ttft_p90": 0.1 * r, "itl_mean": 0.01,
               "itl_p90": 0.01 * r, "latency_mean": 1.0, "meets": r < 4} for r in (1.0, 2.0, 4.0)]
    return {"case": {"name": "chat", "prompt": 512, "output": 256}, "rate": 2 * speed, "trials": trials,
            "sync": {"queries": 2, "ttft": 0.1, "itl": 0.01, "latency": 2 / speed}}


def test_page_is_well_formed_self_contained_and_shows_the_numbers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_serve", lambda model, *rest: [fake_cost(model.label)])
    options = ["--serve", "--use-cases", "chat", "--min-recovery", "1", "--gpu-price", "3.6"]
    assert evaluate(folder, tmp_path, *options) == 0
    page, outline = (tmp_path / "report.html").read_text(), Outline()
    outline.feed(page)
    assert not outline.open and not outline.addresses and "@import" not in page and "url(" not in page
    text = " ".join("".join(outline.text).split())
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["cost"]["W4A8"]["chat"]["sync"]["per_dollar"] == pytest.approx(1000)
    advice = {entry["way"]: entry for entry in found["recommendations"]}
    assert advice["sync"]["label"] == advice["async"]["label"] == "W4A8"
    assert "1,000 queries per dollar, 2.00× bf16's" in text and "simulated" in text and "measured on a CPU" in text
    assert "1; 1,000 (2.00×)" in (tmp_path / "report.md").read_text()


@pytest.mark.e2e
def test_vllm_gives_the_scores_of_torch_and_serves_the_use_cases(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    engine = ["--engine", "enforce_eager=true", "--engine", f"kv_cache_memory_bytes={64 << 20}", "--engine",
              "dtype=float32", "--engine", "max_num_seqs=16"]
    options = ["--data", str(folder), "--tasks", "piqa", "--ppl", str(folder / "text.txt"), "--windows", "2",
               "--window-length", "64", "--prompt-limit", "2", "--answer-tokens", "4"]
    serve = ["--serve", "--use-cases", "chat", "--length-scale", "0.02", "--queries", "1", "--trial-seconds", "0.5",
             "--trials", "2"]

    def accuracy_of_base(candidate, out, *more):
        assert main([f"bf16={folder / 'base'}", candidate, *options, *more, "--out", str(tmp_path / out)]) == 0
        found = json.loads((tmp_path / out / "report.json").read_text())
        return found, found["accuracy"]["bf16"]

    again = f"again={folder / 'base'}@max_num_seqs=8"
    served, here = accuracy_of_base(again, "vllm", *engine, *serve, "--backend", "vllm")
    _, there = accuracy_of_base(f"comet={folder / 'comet'}", "torch")
    assert here["tasks"]["piqa"]["acc"] == there["tasks"]["piqa"]["acc"]
    mine, other = (one["perplexity"]["text"]["perplexity"] for one in (here, there))
    assert mine == pytest.approx(other, rel=1e-3)
    assert served["text"]["again"]["identical"] == 1
    assert all(len(served["cost"][label]["chat"]["trials"]) == 2 for label in ("bf16", "again"))


def test_command_keeps_relative_paths_and_names_of_absolute_ones():
    words = ["/models/big", "a=/models/big/x@mixed", "--ppl", "wikitext:/data/w.txt", "--out", "out/report"]
    assert command(words) == "comet-eval big a=x@mixed --ppl wikitext:w.txt --out out/report"
