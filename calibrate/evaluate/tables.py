# SPDX-License-Identifier: Apache-2.0
"""The report as Markdown tables, and the cells that the HTML page shares with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

NOTHING = "–"


def markdown(result: dict[str, Any]) -> Iterator[str]:
    """The report as lines of Markdown."""
    base = result["models"][0]["label"]
    yield f"# {base}{' and what could replace it' if len(result['models']) > 1 else ''}"
    yield ""
    yield from _table(["model", "what ran", "weights"], [
        [m["label"], m["what"], f"{m['bytes'] / 1e6:,.0f} MB" if m["bytes"] else NOTHING] for m in result["models"]])
    yield from _recommendations(result)
    if "accuracy" in result:
        yield from _accuracy(result)
    if "text" in result:
        yield from _texts(result)
    if "cost" in result:
        yield from _costs(result)
    yield from _footer(result)


Cell = str | list[str]
"""Text, or a number and what is said of it."""


def _table(header: Sequence[Cell], rows: Iterable[Sequence[Cell]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell if isinstance(cell, str) else "; ".join(cell) for cell in row) + " |"
    yield ""


def _recommendations(result: dict[str, Any]) -> Iterator[str]:
    if result["recommendations"]:
        yield "## What to serve"
        yield ""
        yield from _table(["use case", "load", "serve", "why"], [
            [r["use_case"], r["way"], f"**{r['label'] or NOTHING}**", r["why"]] for r in result["recommendations"]])


def _accuracy(result: dict[str, Any]) -> Iterator[str]:
    found, labels = result["accuracy"], [m["label"] for m in result["models"]]
    yield "## Accuracy"
    yield ""
    if result["tasks"]:
        yield "Score in %, recovery of the base's score in % with its 95 % interval, items whose answer changed."
        yield ""
        yield from _table(["task", "metric", "items", *labels], [
            [name, about["metric"], str(about["items"]),
             *(score_cell(found[label]["tasks"][name], label == labels[0]) for label in labels)]
            for name, about in result["tasks"].items()])
        yield from _table(["mean of tasks", *labels], [
            ["score", *(f"{100 * found[label]['mean']['score']:.1f}" for label in labels)],
            ["recovery", *(interval_cell(found[label]["mean"]["recovery"]) for label in labels)]])
    names = list(found[labels[0]]["perplexity"])
    if names:
        yield from _table(["perplexity", "windows", *labels], [
            [name, str(found[labels[0]]["perplexity"][name]["windows"]),
             *(perplexity_cell(found[label]["perplexity"][name], label == labels[0]) for label in labels)]
            for name in names])


def score_cell(row: dict[str, Any], is_base: bool) -> list[str]:
    score = f"{100 * row[row['metric']]:.1f}"
    return [score] if is_base else [score, interval_cell(row["recovery"]), flips_cell(row["flips"])]


def flips_cell(flips: dict[str, int]) -> str:
    return f"{flips['changed']} changed (−{flips['lost']} +{flips['gained']})"


def perplexity_cell(row: dict[str, Any], is_base: bool) -> list[str]:
    ratio, perplexity = row["over_base"], f"{row['perplexity']:.2f}"
    if is_base:
        return [perplexity]
    return [perplexity, f"{ratio['value']:.3f}× ({ratio['low']:.3f} to {ratio['high']:.3f})"]


def interval_cell(found: dict[str, float] | None) -> str:
    """``97.1 (95.0 to 99.2)``, or a dash where the base scored nothing."""
    return NOTHING if found is None else f"{found['value']:.1f} ({found['low']:.1f} to {found['high']:.1f})"


TEXT_COLUMNS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "prefix": "same beginning", "identical": "identical",
                "semantic": "meaning (cosine)"}


def _texts(result: dict[str, Any]) -> Iterator[str]:
    yield "## Text"
    yield ""
    yield (f"Greedy answers beside the base's, {next(iter(result['text'].values()))['prompts']} prompts, at most "
           f"{result['settings']['answer_tokens']} tokens; 1 is the same.")
    yield ""
    yield from _table(["model", *TEXT_COLUMNS.values()], [
        [label, *(NOTHING if row[key] is None else f"{row[key]:.3f}" for key in TEXT_COLUMNS)]
        for label, row in result["text"].items()])


def _costs(result: dict[str, Any]) -> Iterator[str]:
    cost, settings = result["cost"], result["settings"]
    labels = list(cost)
    yield "## Cost"
    yield ""
    yield (f"{result['environment']['device']} at {settings['gpu_price']:g} $ an hour. Synchronous: one query at a "
           f"time. Asynchronous: highest rate with a 90th percentile of TTFT within {1e3 * settings['ttft']:g} ms "
           f"and of ITL within {1e3 * settings['itl']:g} ms. In brackets: queries per dollar over {labels[0]}'s.")
    yield ""
    for way, title in (("sync", "seconds a query; queries per dollar"), ("async", "queries/s; queries per dollar")):
        yield from _table([f"{way}: {title}", *labels], [
            [f"{name} {case['case']['prompt']}/{case['case']['output']}",
             *(cost_cell(cost[label][name], cost[labels[0]][name], way) for label in labels)]
            for name, case in cost[labels[0]].items()])


def cost_cell(found: dict[str, Any], base: dict[str, Any], way: str) -> list[str]:
    first = found["sync"]["latency"] if way == "sync" else found["async"]["rate"]
    if first is None:
        return [NOTHING]
    value, reference = found[way]["per_dollar"], base[way]["per_dollar"]
    ratio = f" ({value / reference:.2f}×)" if found is not base and reference else ""
    return [f"{first:.3g}", f"{value:,.0f}{ratio}"]


def _footer(result: dict[str, Any]) -> Iterator[str]:
    about = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    yield (f"Device {about['device']}; {versions}; commit {about['commit'] or 'unknown'}; seed "
           f"{result['settings']['seed']}.")
    yield ""
    yield f"`{result['command']}`"
    yield ""
    yield "Checkpoints (SHA-256): " + ", ".join(f"{m['label']} `{m['sha256'][:12]}`" for m in result["models"]) + "."
