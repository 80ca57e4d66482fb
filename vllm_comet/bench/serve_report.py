# SPDX-License-Identifier: Apache-2.0
"""Results of ``comet-bench serve``: the file, merging of several runs, the table and the plot.

``engines`` has one object per (model, mode): how it started, what it holds, which log lines prove its kernels. ``rows``
has one per (model, workload, mode), with ``kv_tokens`` repeated from the mode's engine. ``profiles`` has one per model,
mode and batch size that was recorded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_comet.bench import timing
from vllm_comet.bench.serve_modes import BASELINE
from vllm_comet.kernels.tiles import table_name

Key = tuple[str, ...]


class Results:
    """The results file ``path``, written after every addition; ``merge``: files of the same GPU to start from."""

    def __init__(self, path: Path | None, merge: list[Path]) -> None:
        self.environment = timing.environment()
        self.environment["command"] = re.sub(r"(?<= )/\S*/", "", self.environment["command"])  # folders of this machine
        self.path = path or Path("examples/results") / f"serve-{table_name(self.environment['device'])}.json"
        self._engines: dict[Key, dict[str, Any]] = {}
        self._rows: dict[Key, dict[str, Any]] = {}
        self._profiles: dict[tuple[str, str, int], dict[str, Any]] = {}
        for earlier in merge:
            self._add_file(json.loads(earlier.read_text()), earlier)

    def _add_file(self, found: dict[str, Any], path: Path) -> None:
        device = self.environment["device"]
        if found["device"] != device:
            raise ValueError(f"{path} was measured on {found['device']}, this is {device}; ratios would mean nothing")
        if found["command"] not in self.environment["command"]:
            self.environment["command"] = f"{found['command']}; {self.environment['command']}"
        for engine in found["engines"]:
            self.add_engine(engine)
        for row in found["rows"]:
            self.add_row(row)
        for profile in found.get("profiles", []):
            self.add_profile(profile)

    @property
    def engines(self) -> list[dict[str, Any]]:
        return list(self._engines.values())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows as they are stored, each with its engine's KV tokens and, if it ran other kernels, the reason."""
        rows = []
        for (model, _, mode), row in self._rows.items():
            engine = self._engines.get((model, mode), {})
            rows.append(row | {"kv_tokens": engine.get("kv_tokens"), "fallback": engine.get("fallback")})
        return rows

    def add_engine(self, engine: dict[str, Any]) -> None:
        """vLLM's own count of KV tokens in an earlier file outlives one derived from memory."""
        key = engine["model"], engine["mode"]
        earlier = self._engines.get(key, {})
        if earlier.get("kv_tokens_by") == "vllm" and engine.get("kv_tokens_by") != "vllm":
            engine = engine | {name: earlier[name] for name in ("kv_tokens", "kv_tokens_by", "gpu_memory_gib")}
        self._engines[key] = engine
        self._write()

    def add_row(self, row: dict[str, Any]) -> None:
        self._rows[row["model"], row["workload"], row["mode"]] = row
        self._write()

    def add_profile(self, profile: dict[str, Any]) -> None:
        self._profiles[profile["model"], profile["mode"], profile["batch"]] = profile
        self._write()

    def _write(self) -> None:
        found = {"engines": self.engines, "profiles": list(self._profiles.values())}
        timing.write_results(self.path, self.rows, self.environment | found)


def speedups(rows: list[dict[str, Any]], model: str, baseline: str = BASELINE) -> dict[str, dict[str, float]]:
    """Total tokens/s over the baseline's, by workload and mode; rows that failed or fell back are left out."""
    good = [r for r in rows if r["model"] == model and "error" not in r and not r.get("fallback")]
    base = {r["workload"]: r["total_tok_s"] for r in good if r["mode"] == baseline}
    table: dict[str, dict[str, float]] = {}
    for row in good:
        if row["workload"] in base:
            table.setdefault(row["workload"], {})[row["mode"]] = row["total_tok_s"] / base[row["workload"]]
    return table


def print_table(rows: list[dict[str, Any]], engines: list[dict[str, Any]]) -> None:
    for model in dict.fromkeys(found["model"] for found in [*rows, *engines]):
        print(f"\n{model}: engines")
        for engine in (e for e in engines if e["model"] == model):
            if "error" in engine:
                print(f"  {engine['mode']:14} FAILED: {engine['error']}")
                continue
            note = f"  FELL BACK: {engine['fallback']}" if engine["fallback"] else ""
            print(f"  {engine['mode']:14} start {engine['start_s']:6.1f} s  load {engine['load_s']:5.1f} s  weights "
                  f"{engine['weights_gib']:6.2f} GiB  KV tokens {engine['kv_tokens'] or '-'}{note}")
        _print_rows(rows, model)


def _print_rows(rows: list[dict[str, Any]], model: str) -> None:
    table = speedups(rows, model)
    print(f"\n{'workload':16} {'mode':14} {'out tok/s':>10} {'total tok/s':>12} {'over bf16':>10} {'TTFT p50':>9} "
          f"{'ITL p50':>8} {'p99 ms':>8} {'JIT':>4}")
    for row in (r for r in rows if r["model"] == model):
        if "error" in row:
            print(f"{row['workload']:16} {row['mode']:14} FAILED: {row['error']}")
            continue
        ratio = table.get(row["workload"], {}).get(row["mode"])
        itl = row["itl_ms"] or {}
        print(f"{row['workload']:16} {row['mode']:14} {row['out_tok_s']:10,.0f} {row['total_tok_s']:12,.0f} "
              f"{f'{ratio:.2f}' if ratio else '-':>10} {row['ttft_ms']['p50']:9.1f} {itl.get('p50', 0):8.2f} "
              f"{itl.get('p99', 0):8.2f} {row['jit_compilations']:4}")


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Bars of the speed over bf16, a group a workload, a panel a model; below, replays at several rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(r["model"] for r in rows))
    if not models:
        return
    panels = 2 if len({r["workload"] for r in rows if "@" in r["workload"]}) > 1 else 1
    size = 8 * len(models), 4.5 * panels
    figure, axes = plt.subplots(panels, len(models), figsize=size, squeeze=False, layout="constrained")
    for column, model in enumerate(models):
        table = {w: by for w, by in speedups(rows, model).items() if "@" not in w}
        modes = list(dict.fromkeys(mode for by in table.values() for mode in by))
        width = 0.8 / max(1, len(modes))
        for i, mode in enumerate(modes):
            places = [place + i * width for place, by in enumerate(table.values()) if mode in by]
            axes[0][column].bar(places, [by[mode] for by in table.values() if mode in by], width, label=mode)
        axes[0][column].set_xticks([place + 0.3 for place in range(len(table))], list(table), rotation=15)
        axes[0][column].set(ylabel="tokens/s over bf16", title=f"{model}, {device}")
        axes[0][column].grid(alpha=0.3, axis="y")
        if modes:
            axes[0][column].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        if panels == 2:
            _plot_replay(axes[1][column], [r for r in rows if r["model"] == model and "error" not in r])
    figure.savefig(path, dpi=110)


def _plot_replay(axis: Any, rows: list[dict[str, Any]]) -> None:
    replay = [r for r in rows if "@" in r["workload"] and not r.get("fallback")]
    for mode in dict.fromkeys(r["mode"] for r in replay):
        points = sorted((float(r["workload"].split("@")[1]), r["itl_ms"]["p50"], r["ttft_ms"]["p99"])
                        for r in replay if r["mode"] == mode)
        (line,) = axis.plot([p[0] for p in points], [p[1] for p in points], "o-", label=f"{mode}: ITL p50")
        axis.plot([p[0] for p in points], [p[2] for p in points], "x--", color=line.get_color(), label="TTFT p99")
    axis.set(xlabel="requests/s (azure-conv)", ylabel="ms", yscale="log")
    axis.grid(alpha=0.3)
    if replay:
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
