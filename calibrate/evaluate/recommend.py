# SPDX-License-Identifier: Apache-2.0
"""Which model to serve in which use case, by one rule, and the sentence that says why.

Of the models that recover the accuracy asked for, the one with the most queries per dollar; within 3 % of it, the one
that recovers most. The base itself always qualifies.
"""

from __future__ import annotations

from typing import Any

TIE = 0.97
WAYS = {"sync": "one query at a time", "async": "many users"}


def recommendations(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per use case and way of serving: ``use_case``, ``way``, ``label`` and ``why``; without a cost
    measurement one entry for accuracy alone, without an accuracy measurement none."""
    if "accuracy" not in result:
        return []
    base, *others = [model["label"] for model in result["models"]]
    floor = result["settings"]["min_recovery"]
    recovered: dict[str, Any] = {label: _recovery(result, label) for label in others}
    fit = [label for label in others if recovered[label] and recovered[label]["value"] >= floor]
    if "cost" not in result:
        return [_by_accuracy(base, fit, recovered, floor)]
    return [_by_cost(result["cost"], base, fit, recovered, floor, case, way)
            for case in result["cost"][base] for way in WAYS]


def _recovery(result: dict[str, Any], label: str) -> dict[str, float] | None:
    """Mean recovery of the tasks; without tasks, 100 over the ratio of perplexities."""
    found = result["accuracy"][label]
    if found["mean"] is not None:
        return found["mean"]["recovery"]
    texts = [text["over_base"] for text in found["perplexity"].values()]
    if not texts:
        return None
    mean = {key: sum(text[key] for text in texts) / len(texts) for key in ("value", "low", "high")}
    return {"value": 100 / mean["value"], "low": 100 / mean["high"], "high": 100 / mean["low"]}


def _by_accuracy(base: str, fit: list[str], recovered: dict[str, Any], floor: float) -> dict[str, Any]:
    if not fit:
        return {"use_case": "all", "way": "accuracy", "label": base, "why": _nothing_fits(recovered, floor)}
    best = max(fit, key=lambda label: recovered[label]["value"])
    return {"use_case": "all", "way": "accuracy", "label": best, "why":
            f"{_range(recovered[best])} of {base}'s accuracy{_doubt(recovered[best], floor)}; cost was not measured "
            "(--serve)."}


def _by_cost(cost: dict[str, Any], base: str, fit: list[str], recovered: dict[str, Any], floor: float, case: str,
             way: str) -> dict[str, Any]:
    value = {label: found[case][way]["per_dollar"] or 0.0 for label, found in cost.items()}
    entry: dict[str, Any] = {"use_case": case, "way": way}
    if not any(value[label] for label in [base, *fit]):
        return entry | {"label": None, "why": "no rate meets the limits; relax --ttft-ms or --itl-ms, or take a "
                                              "faster device."}
    most = max([base, *fit], key=value.__getitem__)
    near = [label for label in [base, *fit] if value[label] >= TIE * value[most]]
    label = max(near, key=lambda one: 100.0 if one == base else recovered[one]["value"])
    return entry | {"label": label, "why": _why(value, base, label, most, recovered, floor, fit)}


def _why(value: dict[str, float], base: str, label: str, most: str, recovered: dict[str, Any], floor: float,
         fit: list[str]) -> str:
    if label != base:
        gain = f"{value[label] / value[base]:.2f}× {base}'s" if value[base] else f"where {base} misses the limits"
        tail = f"; within {1 - TIE:.0%} of {most}, and more accurate" if label != most else ""
        return (f"{value[label]:,.0f} queries per dollar, {gain}; recovers {_range(recovered[label])}"
                f"{_doubt(recovered[label], floor)}{tail}.")
    cheaper = [one for one in recovered if value[one] > value[base] and one not in fit]
    if not cheaper:
        return f"{value[base]:,.0f} queries per dollar, and no candidate gives more."
    best = max(cheaper, key=value.__getitem__)
    found = f"recovers {_range(recovered[best])}" if recovered[best] else "has no measured recovery"
    return (f"{best} gives {value[best] / value[base]:.2f}× the queries per dollar, but {found}, less than the "
            f"{floor:g} % asked for.")


def _nothing_fits(recovered: dict[str, Any], floor: float) -> str:
    known = [label for label in recovered if recovered[label]]
    if not known:
        return "no accuracy was measured."
    best = max(known, key=lambda label: recovered[label]["value"])
    return f"no candidate recovers {floor:g} %; {best} comes closest with {_range(recovered[best])}."


def _range(found: dict[str, float]) -> str:
    return f"{found['value']:.1f} % ({found['low']:.1f} to {found['high']:.1f})"


def _doubt(found: dict[str, float], floor: float) -> str:
    """More items narrow an interval that reaches below the floor."""
    return f", not yet certain to be above {floor:g} %" if found["low"] < floor else ""
