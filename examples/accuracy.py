# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a model and of its COMET checkpoint in every mode, as JSON, and the README's table made from it.

    python examples/accuracy.py MODEL CHECKPOINT --text wikitext2_test.raw.txt --tasks zeroshot --name smollm2-135m

MODEL is what was calibrated (folder, hub id or .gguf). The text is read as WikiText-2 rows joined with two newlines, in
windows of 2048 tokens. Models run in bf16 on a GPU and in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from measure import Evaluator, add_arguments, device, header, save
from tables import write_readme

from calibrate.loading import open_model
from calibrate.simulate import Activations, load_base, load_comet
from vllm_comet.checkpoint import verify_checkpoint

MODES: list[tuple[str, Activations | None, bool]] = [
    ("bf16", None, False), ("W4", "none", False), ("W4A8", "int8", False), ("W4 KV4", "none", True),
    ("W4A8KV4 (default)", "int8", True), ("W4AxKV4 (mixed)", "mixed", True)]


def measure(model: str, checkpoint: Path, args: argparse.Namespace) -> list[dict]:
    rows = []
    where = device()
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    with open_model(model) as source:
        evaluate = Evaluator(source, args.text, args.windows, args.tasks)
        for name, activations, kv4 in MODES:
            network = (load_base(source.directory, dtype) if activations is None
                       else load_comet(checkpoint, activations, kv4, dtype))
            rows.append({"mode": name, "activations": activations, "kv4": kv4, **evaluate(network.to(where))})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    add_arguments(parser)
    args = parser.parse_args()
    summary = verify_checkpoint(args.checkpoint)
    config = json.loads((args.checkpoint / "config.json").read_text())["quantization_config"]
    save("accuracy", header(args.name, args.commit) | {
        "checkpoint": config,
        "checkpoint_mb": round(summary.num_bytes / 1e6),
        "bf16_mb": round(summary.bf16_bytes / 1e6),
        "int8_share": round(summary.int8_share, 4),
        "rows": measure(args.model, args.checkpoint, args),
    })
    write_readme()


if __name__ == "__main__":
    sys.exit(main())
