# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model and of its COMET checkpoint in every mode, as JSON, and the README's table made from it.

    python examples/accuracy.py MODEL CHECKPOINT --text wikitext2_test.raw.txt --name smollm2-135m

MODEL is what was calibrated (folder, hub id or .gguf). The text is read as WikiText-2 rows joined with two newlines, in
windows of 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from tables import RESULTS, write_readme

from calibrate.loading import open_model
from calibrate.perplexity import text_windows, window_losses
from calibrate.simulate import load_base, load_comet
from vllm_comet.checkpoint import verify_checkpoint

MODES = [("bf16", None, False), ("W4", "none", False), ("W4A8", "int8", False), ("W4 KV4", "none", True),
         ("W4A8KV4 (default)", "int8", True), ("W4AxKV4 (mixed)", "mixed", True)]


def measure(model: str, checkpoint: Path, text: Path, count: int) -> list[dict]:
    rows = []
    windows = text_windows(text, checkpoint, 2048, count, joined=True)
    with open_model(model) as source, torch.no_grad():
        for name, activations, kv4 in MODES:
            network = load_base(source.directory) if activations is None else load_comet(checkpoint, activations, kv4)
            losses = window_losses(network, windows)
            first = {str(n): round(math.exp(sum(losses[:n]) / n), 3) for n in sorted({min(4, count), count})}
            rows.append({"mode": name, "activations": activations, "kv4": kv4, "ppl": first})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--name", required=True)
    args = parser.parse_args()
    summary = verify_checkpoint(args.checkpoint)
    config = json.loads((args.checkpoint / "config.json").read_text())["quantization_config"]
    result = {
        "name": args.name,
        "device": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "command": f"python examples/accuracy.py MODEL CHECKPOINT --text {args.text.name} --windows {args.windows} "
                   f"--name {args.name}",
        "checkpoint": config,
        "checkpoint_mb": round(summary.num_bytes / 1e6),
        "bf16_mb": round(summary.bf16_bytes / 1e6),
        "int8_share": round(summary.int8_share, 4),
        "rows": measure(args.model, args.checkpoint, args.text, args.windows),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"accuracy-{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    write_readme()


if __name__ == "__main__":
    sys.exit(main())
