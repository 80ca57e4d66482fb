# SPDX-License-Identifier: Apache-2.0
"""An independent yardstick: the same model quantised by llm-compressor and measured by the same evaluator, as JSON.

    python examples/yardstick.py MODEL --data calibration.txt --text wikitext2_test.raw.txt --name smollm2-135m

MODEL is a Hugging Face folder, hub id or .gguf file. Needs ``pip install llmcompressor`` (0.14) beside this package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from measure import Evaluator, add_arguments, device, header, save
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibrate.data import load_text, token_windows
from calibrate.loading import ModelSource, open_model

SCHEMES: dict[str, tuple[int, int | None, int | None]] = {
    "W4A16 g64": (4, 64, None), "W4A8 g64": (4, 64, 8), "W8A8": (8, None, 8), "W4A16 g128": (4, 128, None),
    "W4A8 g128": (4, 128, 8),
}
"""Bits of the weights, channels of a weight scale (None: one a row), bits of the activations (None: 16)."""
BATCH = 8


def gptq(model: PreTrainedModel, scheme: str, windows: torch.Tensor) -> PreTrainedModel:
    """``model`` with every linear but the head quantised by llm-compressor's GPTQ; its forward simulates the scheme.

    Weights are symmetric integers, activations dynamic per token, as in llm-compressor's presets of these names.
    windows: int64 ``[samples, length]``. Raises ValueError where llm-compressor can't cut a row in such groups.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    bits, group_size, activation_bits = SCHEMES[scheme]
    strategy: dict[str, Any] = {"strategy": "channel"}
    if group_size is not None:
        strategy = {"strategy": "group", "group_size": group_size}
    activations = None if activation_bits is None else QuantizationArgs(
        num_bits=activation_bits, type="int", symmetric=True, strategy="token", dynamic=True)
    group = QuantizationScheme(targets=["Linear"], input_activations=activations,
                               weights=QuantizationArgs(num_bits=bits, type="int", symmetric=True, **strategy))
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    oneshot(model=model, dataset=DataLoader(samples, batch_size=BATCH),
            recipe=GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"]))
    return model.eval().requires_grad_(False)


def measure(model: Path, scheme: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row; ``refused`` says why llm-compressor can't make the scheme of this model."""
    torch.set_num_threads(1 if args.jobs > 1 else torch.get_num_threads())
    evaluate = Evaluator(ModelSource(model), args.text, args.windows, args.tasks)
    tokenizer = evaluate.tokenizer
    windows = token_windows(load_text(args.data, tokenizer), tokenizer, None, args.length, 0, 128)
    row = {"scheme": scheme, "data": args.data.name if args.data else "default", "samples": len(windows),
           "length": args.length}
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device())
    try:
        quantised = gptq(base, scheme, windows)
    except ValueError as error:
        return row | {"refused": str(error).splitlines()[0]}
    return row | evaluate(quantised if device().type == "cuda" else quantised.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="calibration text (default: comet-calibrate's)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--jobs", type=int, default=1, help="schemes at a time (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    result, rows = header(args.name, args.commit), []
    result["versions"]["llmcompressor"] = importlib.metadata.version("llmcompressor")
    with open_model(args.model) as source, ProcessPoolExecutor(
            args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(measure, source.directory, scheme, args): scheme for scheme in args.schemes}
        for task in as_completed(tasks):
            failure = task.exception()
            rows.append({"scheme": tasks[task], "failed": repr(failure)[:300]} if failure else task.result())
            print(json.dumps(rows[-1]), flush=True)
            save("yardstick", result | {"rows": sorted(rows, key=lambda row: args.schemes.index(row["scheme"]))})


if __name__ == "__main__":
    sys.exit(main())
