# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a model and of its COMET checkpoint in every mode, as JSON, and the README's table made from it.

    python examples/accuracy.py MODEL CHECKPOINT --text wikitext2_test.raw.txt --tasks zeroshot --name smollm2-135m

MODEL is what was calibrated (folder, hub id or .gguf). The text is read as WikiText-2 rows joined with two newlines, in
windows of 2048 tokens. Models run in bf16 on a GPU and in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measure import Evaluator, add_arguments, device, header, save
from tables import write_readme

from calibrate.loading import ModelSource, open_model
from calibrate.simulate import Activations, load_base, load_comet
from vllm_comet.checkpoint import verify_checkpoint

MODES: list[tuple[str, Activations | None, bool]] = [
    ("bf16", None, False), ("W4", "none", False), ("W4A8", "int8", False), ("W4 KV4", "none", True),
    ("W4A8KV4 (default)", "int8", True), ("W4AxKV4 (mixed)", "mixed", True)]


def measure(model: Path, mode: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row, of ``MODES[mode]``."""
    torch.set_num_threads(1 if args.jobs > 1 else torch.get_num_threads())
    name, activations, kv4 = MODES[mode]
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    network = load_base(model, dtype) if activations is None else load_comet(args.checkpoint, activations, kv4, dtype)
    evaluate = Evaluator(ModelSource(model), args.text, args.windows, args.tasks)
    return {"mode": name, "activations": activations, "kv4": kv4, **evaluate(network.to(device()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="modes at a time (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    summary = verify_checkpoint(args.checkpoint)
    result = header(args.name, args.commit) | {
        "checkpoint": json.loads((args.checkpoint / "config.json").read_text())["quantization_config"],
        "checkpoint_mb": round(summary.num_bytes / 1e6),
        "bf16_mb": round(summary.bf16_bytes / 1e6),
        "int8_share": round(summary.int8_share, 4),
    }
    rows: dict[int, dict[str, Any]] = {}
    with open_model(args.model) as source, ProcessPoolExecutor(
            args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(measure, source.directory, mode, args): mode for mode in range(len(MODES))}
        for task in as_completed(tasks):
            rows[tasks[task]] = task.result()
            print(json.dumps(task.result()), flush=True)
            save("accuracy", result | {"rows": [rows[mode] for mode in sorted(rows)]})
    write_readme()


if __name__ == "__main__":
    sys.exit(main())
