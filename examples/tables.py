# SPDX-License-Identifier: Apache-2.0
"""Write the README's result tables from ``examples/results/*.json``: ``python examples/tables.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
GEMM_MODES = ["comet-g128", "comet-g64", "comet-channel", "marlin-w4a16", "machete-w4a16", "cutlass-w8a8-int8",
              "cutlass-fp8", "cutlass-w4a8-fp8", "humming-w4a8-int8"]
GEMM_ROWS = [1, 16, 64, 128, 256, 512, 1024, 4096]
BASELINES = ("bf16", "w4a16")  # the first that was measured: 70B in bf16 needs more than one GPU
DEFAULT_MODE, MIXED_MODE, SHARE = "W4A8KV4", "W4AxKV4", "INT8 share"
KV_VARIANTS = ("default", "no K smoothing", "no K offset", "neither")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]


def source(path: Path, found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "triton", "vllm", "transformers")
                         if found["versions"].get(name))
    text = f"[{path.name}](examples/results/{path.name}): {found['device']}, {versions}, `{found['command']}`"
    return f"{text}. {found['note']}" if "note" in found else text


def accuracy() -> Iterator[str]:
    for path in sorted(RESULTS.glob("accuracy-*.json")):
        found = json.loads(path.read_text())
        counts = list(found["rows"][0]["ppl"])
        yield (f"**{found['name']}**, WikiText-2 perplexity (raw test, rows joined, windows of 2048); checkpoint "
               f"{found['checkpoint_mb']} MB, bf16 {found['bf16_mb']} MB. {source(path, found)}")
        yield ""
        yield from table(["mode", *(f"first {n} windows" for n in counts)],
                         [[row["mode"], *(f"{row['ppl'][n]:.2f}" for n in counts)] for row in found["rows"]])
        yield ""


def ablation_rows(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by variant; nothing of a run that did not get to the two others are compared with."""
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"] if "failed" not in row}
    return rows if {"bf16", "default"} <= rows.keys() else {}


def ablation() -> Iterator[str]:
    for path in sorted(RESULTS.glob("ablation-*.json")):
        found, rows = json.loads(path.read_text()), ablation_rows(path)
        if not rows:
            continue
        base, modes = rows["bf16"], list(rows["default"]["ppl"])
        tasks = [mode for mode in (DEFAULT_MODE, MIXED_MODE) if any(_percent(row, mode) for row in rows.values())]
        yield (f"**{found['name']}**, the calibrator with each part left out or changed: WikiText-2 perplexity (raw "
               f"test, {base['windows']} windows of 2048) by mode"
               + (f", and mean accuracy of nine tasks in {' and '.join(tasks)}" if tasks else "")
               + f". bf16: {', '.join(filter(None, (format(base['ppl']['bf16'], '.2f'), _percent(base, 'bf16'))))}. "
               + source(path, found))
        yield ""
        yield from table(["", *modes, *(f"tasks, {mode}" for mode in tasks)], [
            [name, *(f"{row['ppl'][mode]:.2f}" if mode in row["ppl"] else "" for mode in modes),
             *(_percent(row, mode) for mode in tasks)]
            for name, row in rows.items() if name != "bf16" and not name.startswith(SHARE)])
        yield ""


def shares() -> Iterator[str]:
    for path in sorted(RESULTS.glob("ablation-*.json")):
        found, rows = json.loads(path.read_text()), ablation_rows(path)
        measured = {row["int8_share"]: row for name, row in rows.items()
                    if (name.startswith(SHARE) or name == "default") and MIXED_MODE in row["ppl"]}
        if len(measured) < 2:
            continue
        base = rows["default"]["ppl"][DEFAULT_MODE]
        yield (f"**{found['name']}**, `mixed` mode by the share of channels that stay INT8; {DEFAULT_MODE} has "
               f"{base:.2f}. [{path.name}](examples/results/{path.name})")
        yield ""
        yield from table(["INT8 share", f"perplexity, {MIXED_MODE}", f"over {DEFAULT_MODE}"], [
            [f"{row['int8_share']:.1%}", f"{row['ppl'][MIXED_MODE]:.2f}", f"{row['ppl'][MIXED_MODE] / base:.2f}"]
            for _, row in sorted(measured.items())])
        yield ""


def kv_cache() -> Iterator[str]:
    """The 4-bit cache on its own, a line a model."""
    lines, sources = [], []
    for path in sorted(RESULTS.glob("kv-cache-*.json")):
        found = json.loads(path.read_text())
        ppl = {row["variant"]: row["ppl"] for row in found["rows"]}
        base = ppl.pop("bf16")
        lines.append([found["name"], str(found["kv_group_size"]), str(found["windows"]), f"{base:.2f}",
                      *(f"{ppl[name]:,.2f} ({ppl[name] / base - 1:+,.1%})" if name in ppl else ""
                        for name in KV_VARIANTS)])
        sources.append(source(path, found))
    yield "**The 4-bit KV cache alone**, under unquantised weights and activations: WikiText-2 perplexity (raw test)."
    yield from [f"{text}." for text in sources]
    yield ""
    yield from table(["", "KV group size", "windows", "without it", *KV_VARIANTS], lines)
    yield ""


def yardstick() -> Iterator[str]:
    """llm-compressor's rows, and of our runs on the same model what they are to be compared with."""
    for path in sorted(RESULTS.glob("yardstick-*.json")):
        found = json.loads(path.read_text())
        counts = next(list(row["ppl"]) for row in found["rows"] if "ppl" in row)
        lines = []
        for row in found["rows"]:
            failure = row.get("refused") or row.get("failed")
            ppl = [f"not made: {failure.split('.')[0]}", *[""] * (len(counts) - 1)] if failure else _cells(row, counts)
            lines.append([f"llm-compressor, GPTQ {row['scheme']}", *ppl, _percent(row)])
        lines += _ours(path, counts)
        yield (f"**{found['name']}**, the same model quantised by llm-compressor {found['versions']['llmcompressor']} "
               f"on the same calibration text, measured by the same evaluator. {source(path, found)}")
        yield ""
        header = ["WikiText-2 perplexity", *(f"first {n} windows" for n in counts), "mean of nine tasks"]
        yield from table(header, lines)
        yield ""


def _ours(path: Path, counts: list[str]) -> list[list[str]]:
    """Lines of the yardstick's table from the ablation of the same model or, without one, from its accuracy."""
    accuracy_path = RESULTS / path.name.replace("yardstick", "accuracy")
    ablation_path = RESULTS / path.name.replace("yardstick", "ablation")
    rows = ablation_rows(ablation_path) if ablation_path.exists() else {}
    if rows:
        windows = str(rows["bf16"]["windows"])
        wanted = (("bf16", "bf16", "bf16"), ("COMET W4A8 g64", "default", "W4A8"),
                  ("COMET W4A8KV4 g64", "default", DEFAULT_MODE),
                  ("COMET W4A8KV4 g128", "weight groups of 128", DEFAULT_MODE))
        return [[label, *_cells({"ppl": {windows: rows[variant]["ppl"][mode]}}, counts), _percent(rows[variant], mode)]
                for label, variant, mode in wanted if variant in rows]
    if not accuracy_path.exists():
        return []
    labels = {"bf16": "bf16", f"{DEFAULT_MODE} (default)": "COMET W4A8KV4 g64"}
    return [[labels[row["mode"]], *_cells(row, counts), ""]
            for row in json.loads(accuracy_path.read_text())["rows"] if row["mode"] in labels]


def _cells(row: dict[str, Any], counts: list[str]) -> list[str]:
    return [f"{row['ppl'][n]:.2f}" if n in row["ppl"] else "" for n in counts]


def _percent(row: dict[str, Any], mode: str | None = None) -> str:
    """The mean accuracy of a row, or of one of its modes; empty where it was not measured."""
    value = row.get("zeroshot_mean")
    if mode is not None and value is not None:
        value = value.get(mode)
    return "" if value is None else f"{value:.1%}"


def gemm() -> Iterator[str]:
    for path in sorted(RESULTS.glob("gemm-*.json")):
        found = json.loads(path.read_text())
        yield ("**W4Ax GEMM**, qkv, o, gate_up and down: geometric mean of the speed over cuBLAS bf16, product alone / "
               f"with the activation quantisation the mode needs. {source(path, found)}")
        for model in dict.fromkeys(row["model"] for row in found["rows"]):
            yield from ["", f"{model}:", ""]
            yield from gemm_speeds([row for row in found["rows"] if row["model"] == model])
        yield ""


def gemm_speeds(rows: list[dict[str, Any]]) -> list[str]:
    time = {(r["mode"], r["layer"], r["m"]): (r["us"], r["us_with_quant"]) for r in rows if r["mode"] != "comet-fused"}
    layers = sorted({layer for _, layer, _ in time})

    def speed(mode: str, m: int, column: int) -> str:
        if any((mode, layer, m) not in time for layer in layers):
            return "–"
        base = [time["cublas-bf16", layer, m][0] / time[mode, layer, m][column] for layer in layers]
        return f"{geometric_mean(base):.2f}"

    measured = [m for m in GEMM_ROWS if any(key[2] == m for key in time)]
    return table(["M", *GEMM_MODES], [
        [str(m), *(f"{speed(mode, m, 0)} / {speed(mode, m, 1)}" for mode in GEMM_MODES)] for m in measured])


def attention() -> Iterator[str]:
    for path in sorted(RESULTS.glob("attention-*.json")):
        found = json.loads(path.read_text())
        time = {(r["model"], r["batch"], r["context"], r["mode"]): r["us"] for r in found["rows"]
                if r["phase"] == "decode"}
        cells = sorted({key[1:3] for key in time})

        def over(mode: str, *cell: Any, time: dict[Any, float] = time) -> str:
            return f"{time[*cell, mode] / time[*cell, 'comet-int4']:.2f}"

        yield ("**Decode attention over the 4-bit cache**, 32 query and 8 KV heads of 128, CUDA-graph replays. "
               f"{source(path, found)}")
        yield ""
        peers = {"fa3-bf16": "over FA3 bf16", "fa3-fp8": "over FA3 FP8 KV",
                 "vllm-int4": "over vLLM's int4_per_token_head"}
        yield from table(["batch, context", "µs", *peers.values()], [
            [f"{batch}, {context:,}", f"{time['8b', batch, context, 'comet-int4']:.1f}",
             *(over(mode, "8b", batch, context) for mode in peers)] for batch, context in cells])
        yield ""
        yield "The same with other heads, over FA3 bf16:"
        yield ""
        models = [model for model in dict.fromkeys(key[0] for key in time) if model != "8b"]
        yield from table(["", *(f"{batch}, {context:,}" for batch, context in cells)], [
            [model, *(over("fa3-bf16", model, *cell) for cell in cells)] for model in models])
        yield ""


def serve() -> Iterator[str]:
    for path in sorted(RESULTS.glob("serve-*.json")):
        found = json.loads(path.read_text())
        yield (f"**Whole models, random weights**, one GPU; KV tokens in {found['engines'][0]['gpu_memory_gib']} GiB. "
               f"{source(path, found)}")
        for model in dict.fromkeys(row["model"] for row in found["rows"]):
            rows = [row for row in found["rows"] if row["model"] == model and "error" not in row]
            base = next((mode for mode in BASELINES if any(row["mode"] == mode for row in rows)), BASELINES[0])
            replayed = [row for row in rows if "@" in row["workload"]]
            if len(replayed) < len(rows):
                yield from ["", f"{model}: tokens/s, prompts included, and the ratio to {base}.", ""]
                yield from throughput([row for row in rows if row not in replayed], found["engines"], model, base)
            if replayed:
                yield from ["", f"{model}: requests with a trace's lengths and arrivals, ms at p50 / p99.", ""]
                yield from table(["requests/s", "mode", "output tokens/s", "to the first token", "between tokens"], [
                    [row["workload"].split("@")[1], row["mode"], f"{row['out_tok_s']:,.0f}",
                     *(f"{row[key]['p50']:.1f} / {row[key]['p99']:.1f}" for key in ("ttft_ms", "itl_ms"))]
                    for row in sorted(replayed, key=lambda row: float(row["workload"].split("@")[1]))])
        recorded = [row for row in found.get("profiles", []) if "error" not in row]
        if recorded:
            yield from ["", "Where the GPU's time in a decoding step goes, ms, from a profiler:", ""]
            yield from profiles(recorded)
        yield ""


def profiles(rows: list[dict[str, Any]]) -> list[str]:
    """A line a mode and batch size. Waiting for the host is left out: the profiler makes it longer."""
    parts = {"w4ax": "W4Ax products", "products": "other products", "attention": "attention",
             "norms": "norms, activations, quantisation", "rest": "rest", "gaps": "gaps"}
    return table(["requests", "mode", "in all", *parts.values()], [
        [str(row["batch"]), row["mode"], f"{sum(row['parts_us'][part] for part in parts) / 1e3:.2f}",
         *(f"{row['parts_us'][part] / 1e3:.2f}" for part in parts)] for row in sorted(rows, key=lambda r: r["batch"])])


def throughput(
    rows: list[dict[str, Any]], engines: list[dict[str, Any]], model: str, baseline: str
) -> list[str]:
    """One line a mode; what failed or ran other kernels than it claims says so and gets no ratio."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    speed = {(row["mode"], row["workload"]): row for row in rows if not row["fallback"]}
    lines = []
    for engine in (engine for engine in engines if engine["model"] == model):
        mode = engine["mode"]
        if "error" in engine or engine["fallback"]:
            lines.append([mode, "did not start" if "error" in engine else "ran other kernels", *[""] * len(workloads)])
            continue
        cells = []
        for workload in workloads:
            row, base = speed.get((mode, workload)), speed.get((baseline, workload))
            ratio = f" ({row['total_tok_s'] / base['total_tok_s']:.2f})" if row and base else ""
            cells.append(f"{row['total_tok_s']:,.0f}{ratio}" if row else "")
        lines.append([mode, f"{engine['kv_tokens']:,}" if engine["kv_tokens"] else "", *cells])
    return table(["mode", "KV tokens", *workloads], lines)


def scale() -> Iterator[str]:
    for path in sorted(RESULTS.glob("scale-*.json")):
        found = json.loads(path.read_text())
        yield ("**Calibrating large models**, random weights of the true shapes, 128 samples of 2048 tokens. "
               f"{source(path, found)}")
        yield ""
        header = ["model", "GPUs", "layers measured", "seconds a layer", "whole model", "GPU memory", "host memory"]
        yield from table(header, [
            [row["model"], str(row["gpus"]), f"{row['layers']} of {row['of_layers']}",
             f"{mean(row['layer_seconds'][1:] or row['layer_seconds']):.1f}",
             f"{row['projected_minutes']:.0f} min{'' if row['layers'] == row['of_layers'] else ' (projected)'}",
             f"{row['gpu_peak_gib']:.1f} GiB", f"{row['host_peak_gib']:.1f} GiB"] for row in found["rows"]])
        yield ""


def write_readme() -> None:
    text = README.read_text()
    for make in (scale, accuracy, kv_cache, ablation, shares, yardstick, gemm, attention, serve):
        begin, end = f"<!-- {make.__name__}:begin -->\n", f"<!-- {make.__name__}:end -->"
        if begin not in text:
            continue
        head, rest = text.split(begin)
        text = head + begin + "\n".join([*make(), ""]) + end + rest.split(end)[1]
    README.write_text(text)


if __name__ == "__main__":
    write_readme()
