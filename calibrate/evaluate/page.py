# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML page without outside resources: what to serve, plots, tables, settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from calibrate.evaluate.charts import COLOURS, Point, Row, curve_plot, legend, pareto_plot, recovery_plot
from calibrate.evaluate.recommend import WAYS
from calibrate.evaluate.tables import TEXT_COLUMNS, Cell, cost_cell, flips_cell, perplexity_cell

STYLE = Path(__file__).with_name("style.css")
WAY_TITLES = {way: title[0].upper() + title[1:] for way, title in WAYS.items()}


def html_page(result: dict[str, Any]) -> str:
    base = result["models"][0]["label"]
    sections = [_head(result), _models(result), *_notes(result), *_advice(result)]
    if "accuracy" in result:
        sections += _accuracy(result)
    if "cost" in result:
        sections += _cost(result)
    if "text" in result:
        sections += _texts(result)
    sections += [_settings(result)]
    return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(base)}: comet-eval</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}"
            f"</style>\n</head>\n<body>\n<main>\n{chr(10).join(sections)}\n</main>\n</body>\n</html>\n")


def _head(result: dict[str, Any]) -> str:
    base, *others = [m["label"] for m in result["models"]]
    count = sum(task["items"] for task in result.get("tasks", {}).values())
    parts = [f"{count:,} items of {len(result['tasks'])} tasks"] if count else []
    if "cost" in result:
        parts.append(f"{len(result['cost'][base])} use cases served on {result['environment']['device']}")
    title = f"{base} and what could replace it" if others else base
    lead = f"{', '.join(others)} measured against {base}: " if others else ""
    return f'<h1>{escape(title)}</h1><p class="lead">{escape(lead + "; ".join(parts))}.</p>'


def _models(result: dict[str, Any]) -> str:
    cards = (f'<div class="card" style="--c:var(--c{i % COLOURS})"><h3>{escape(m["label"])}</h3>'
             f'<small>{escape(m["what"])}</small><dl>{_facts(result, m)}</dl></div>'
             for i, m in enumerate(result["models"]))
    return f'<div class="models">{"".join(cards)}</div>'


def _facts(result: dict[str, Any], model: dict[str, Any]) -> str:
    facts = [("weights", f"{model['bytes'] / 1e6:,.0f} MB")] if model["bytes"] else []
    if "accuracy" in result:
        found = result["accuracy"][model["label"]]
        if found["mean"] and found["mean"]["recovery"]:
            facts.append(("recovery", f"{found['mean']['recovery']['value']:.1f} %"))
        facts += [(f"PPL {name.partition('_')[0]}", f"{text['perplexity']:.2f}")
                  for name, text in found["perplexity"].items()]
    if "cost" in result:
        for way, title in (("sync", "per $, alone"), ("async", "per $, loaded")):
            gain = gain_over_base(result["cost"], model["label"], way)
            facts.append((title, f"{gain:.2f}×" if gain else "–"))
    return "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in facts)


def gain_over_base(cost: dict[str, Any], label: str, way: str) -> float | None:
    """Geometric mean over use cases of queries per dollar over the base's; None if one of them is not to be had."""
    base = cost[next(iter(cost))]
    pairs = [(cost[label][name][way]["per_dollar"], base[name][way]["per_dollar"]) for name in base]
    return geometric_mean(a / b for a, b in pairs) if all(a and b for a, b in pairs) else None


def _notes(result: dict[str, Any]) -> Iterator[str]:
    simulated = [m["label"] for m in result["models"] if m["simulated"]]
    harness = any(task["kind"] == "lm-eval" for task in result.get("tasks", {}).values())
    if simulated:
        yield _note(f"Answers of {', '.join(simulated)} were computed by the torch reference that defines the format "
                    "(simulated), not by the kernels that serve it"
                    + (", but for lm-eval's tasks, which vLLM served." if harness else "."))
    if "cost" in result and not result["environment"]["gpu"]:
        yield _note("Cost was measured on a CPU. It shows how this report works and says nothing about a GPU, where "
                    "these formats are meant to run.")
    if "cost" in result and result["settings"]["length_scale"] != 1:
        scale = result["settings"]["length_scale"]
        yield _note(f"Prompts and answers have {scale:g} times the lengths of the use cases.")


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _advice(result: dict[str, Any]) -> Iterator[str]:
    advice = result["recommendations"]
    if not advice:
        return
    colour = {m["label"]: i % COLOURS for i, m in enumerate(result["models"])}

    def cell(entry: dict[str, Any], kind: str = "") -> str:
        label = entry["label"]
        style = f' style="color:var(--c{colour[label]})"' if label else ""
        way = WAY_TITLES.get(entry["way"], "")
        return (f'<div{kind}><em>{way}</em><strong{style}>{escape(label or "none")}</strong>'
                f'<span>{escape(entry["why"])}</span></div>')

    if advice[0]["way"] == "accuracy":
        body = '<div class="case">Every use case</div>' + cell(advice[0], ' class="whole"')
    else:
        body = '<div class="head"></div>' + "".join(f'<div class="head">{title}</div>' for title in WAY_TITLES.values())
        cases = result["cost"][result["models"][0]["label"]]
        for name, found in cases.items():
            body += f'<div class="case">{_cell([name, _lengths(found)])}</div>'
            body += "".join(cell(entry) for entry in advice if entry["use_case"] == name)
    yield ("<section><h2>What to serve</h2><p>The most queries per dollar among the models that recover "
           f"{result['settings']['min_recovery']:g} % of the base's accuracy.</p>"
           f'<div class="card advice">{body}</div></section>')


def _accuracy(result: dict[str, Any]) -> Iterator[str]:
    found, tasks = result["accuracy"], result["tasks"]
    base, *others = found
    if tasks:
        yield _recovery(result)
        yield _section(
            "Scores and flips", "Score in % with its 95 % interval; changed: items whose answer is another than the "
            "base's, of which right before (−) and right now (+). Near chance, recovery says little.",
            _table(["task", "chance", *found], [
                [name, _chance(about), *(_score(found[label]["tasks"][name], label == base) for label in found)]
                for name, about in tasks.items()]))
    texts = {name: [found[label]["perplexity"][name] for label in found] for name in found[base]["perplexity"]}
    if texts:
        yield _section(
            "Perplexity", "Over the base's, with the 95 % interval over windows.",
            _table(["text", "windows", *found], [
                [name, str(row[0]["windows"]), *(perplexity_cell(one, one is row[0]) for one in row)]
                for name, row in texts.items()]))


def _recovery(result: dict[str, Any]) -> str:
    found, floor = result["accuracy"], result["settings"]["min_recovery"]
    base, *others = found
    rows = [Row(name, f"{about['metric']}, {about['items']} items",
                [_triple(found[label]["tasks"][name]["recovery"]) for label in others])
            for name, about in result["tasks"].items()]
    mean = [_triple(found[label]["mean"]["recovery"]) for label in others]
    plot = recovery_plot([*rows, Row("mean of tasks", "", mean, strong=True)], others, floor)
    return ("<section><h2>Recovery of the base's accuracy</h2><p>Score in % of the base's, with the 95 % interval of a "
            f'paired bootstrap over items. Dashed: the {floor:g} % asked for.</p><div class="card">'
            f"{legend(list(found), skip=1)}{plot}</div></section>")


def _triple(found: dict[str, float] | None) -> tuple[float, float, float] | None:
    return None if found is None else (found["value"], found["low"], found["high"])


def _chance(about: dict[str, Any]) -> str:
    return "–" if about["chance"] is None else f"{100 * about['chance']:.0f}"


def _score(row: dict[str, Any], is_base: bool) -> list[str]:
    ends = f"{100 * row['interval']['low']:.1f} to {100 * row['interval']['high']:.1f}"
    return [f"{100 * row[row['metric']]:.1f}", ends, *([] if is_base else [flips_cell(row["flips"])])]


def _cost(result: dict[str, Any]) -> Iterator[str]:
    cost, settings = result["cost"], result["settings"]
    base = cost[next(iter(cost))]
    if "accuracy" in result and result["tasks"]:
        panels = "".join(_pareto(result, way) for way in WAYS)
        yield ("<section><h2>Cost against recovery</h2><p>Further right is cheaper, higher is more accurate; the "
               "dotted line joins the models that none beats in both. Queries per dollar are geometric means over the "
               f'use cases.</p><div class="card panels">{panels}</div></section>')
    curves = "".join('<div class="pair">' + "".join(_curves(cost, name, key, settings) for key in ("ttft", "itl"))
                     + "</div>" for name in base)
    yield ("<section><h2>Latency under load</h2><p>90th percentiles over the rate at which queries arrive. Dashed: the "
           "limit; hollow: a rate at which a limit was missed.</p>"
           f'<div class="card">{legend(list(cost))}<div class="panels wide">{curves}</div></div></section>')
    for way, note in (("sync", "Seconds for a query on its own; queries per dollar (over the base's)."),
                      ("async", "Highest rate within the limits, queries/s; queries per dollar (over the base's).")):
        rows = [[[name, _lengths(found)], *(cost_cell(one[name], found, way) for one in cost.values())]
                for name, found in base.items()]
        yield _section(f"Cost: {WAYS[way]}", note, _table(["use case", *cost], rows))


def _lengths(found: dict[str, Any]) -> str:
    return f"{found['case']['prompt']:,} → {found['case']['output']:,} tokens"


def _pareto(result: dict[str, Any], way: str) -> str:
    points = []
    for index, label in enumerate(result["cost"]):
        recovery, gain = result["accuracy"][label]["mean"]["recovery"], gain_over_base(result["cost"], label, way)
        if recovery and gain:
            points.append(Point(index, label, gain, recovery["value"], recovery["low"], recovery["high"]))
    if not points:
        return ""
    return pareto_plot(points, WAY_TITLES[way], "queries per dollar over the base's", "recovery, %")


def _curves(cost: dict[str, Any], name: str, key: str, settings: dict[str, Any]) -> str:
    curves = [(i, label, [(t["rate"], 1e3 * t[f"{key}_p90"], t["meets"]) for t in found[name]["trials"]])
              for i, (label, found) in enumerate(cost.items())]
    title = {"ttft": "time to first token, ms", "itl": "between tokens, ms"}[key]
    return curve_plot(curves, 1e3 * settings[key], name, title)


def _texts(result: dict[str, Any]) -> Iterator[str]:
    rows = [[label, *("–" if row[key] is None else f"{row[key]:.3f}" for key in TEXT_COLUMNS)]
            for label, row in result["text"].items()]
    count = next(iter(result["text"].values()))["prompts"]
    yield _section("How different the text is", f"Greedy answers to {count} prompts beside the base's, at most "
                   f"{result['settings']['answer_tokens']} tokens. 1: the same.",
                   _table(["model", *TEXT_COLUMNS.values()], rows))


def _section(title: str, note: str, body: str) -> str:
    return f'<section><h2>{escape(title)}</h2><p>{escape(note)}</p><div class="card scroll">{body}</div></section>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(cell: Cell) -> str:
    first, *rest = [cell] if isinstance(cell, str) else cell
    return escape(first) + "".join(f"<small>{escape(line)}</small>" for line in rest)


def _settings(result: dict[str, Any]) -> str:
    about = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    hashes = ", ".join(f"{m['label']} {m['sha256'][:12]}" for m in result["models"])
    return (f"<details><summary>Command and settings</summary><pre>{escape(result['command'])}</pre><pre>"
            f"{escape(json.dumps(result['settings'], indent=1, ensure_ascii=False))}</pre></details>"
            f"<footer>{escape(about['device'])}; {escape(versions)}; commit {escape(about['commit'] or 'unknown')}. "
            f"Checkpoints, SHA-256: {escape(hashes)}. Every number is in report.json.</footer>")
