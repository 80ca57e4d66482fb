# SPDX-License-Identifier: Apache-2.0
"""What the 4-bit KV cache alone costs: perplexity of the unquantised model over that cache, as JSON.

    python examples/kv_cache.py MODEL --text wikitext2_test.raw.txt --windows 4 --name qwen2.5-1.5b

MODEL is a Hugging Face folder, hub id or .gguf file with separate q, k and v projections. Weights and activations stay
float; K and V are what the cache returns, with and without the offset and smoothing of K that comet-calibrate finds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from ablation import VARIANTS
from measure import Evaluator, add_arguments, device, header, save
from transformers import PreTrainedModel

from calibrate.data import load_text, token_windows
from calibrate.decoder import DecoderBuilder
from calibrate.kv_smooth import smooth_k
from calibrate.loading import ModelSource, open_model
from calibrate.models import Dims, family_of
from calibrate.pipeline import CHUNK_TOKENS, Options, kv_format, layer_tensors
from calibrate.simulate import kv4_attention, load_base
from vllm_comet.checkpoint import K_OFFSET

PARTS = ("no K offset", "no K smoothing")
PATCHES: dict[str, dict[str, Any]] = {"default": {}, **{part: VARIANTS[part].patches for part in PARTS}}
PATCHES["neither"] = {target: value for part in PARTS for target, value in PATCHES[part].items()}
"""By variant, what is replaced in the calibrator, by dotted name."""
Fitted = list[tuple[dict[str, torch.Tensor], torch.Tensor]]


@torch.no_grad()
def fit(source: ModelSource, windows: torch.Tensor, group_size: int) -> dict[str, Fitted]:
    """By variant and layer: its attention's float32 tensors with K smoothed, and the offset of K ``[kv_heads, D]``.

    windows: int64 ``[samples, length]`` of calibration text.
    """
    config, dtype = source.config(), torch.float32
    family, dims = family_of(config), Dims.of(config)
    if family.fused:
        raise SystemExit(f"{config.architectures[0]} has q, k and v in one projection, which this script can't read.")
    builder = DecoderBuilder(config, family, device(), dtype)
    hidden = builder.embed(windows, source.tensor("model.embed_tokens.weight"))
    found: dict[str, Fitted] = {name: [] for name in PATCHES}
    for index in range(dims.layers):
        tensors = layer_tensors(source, index, family, dims)
        for name, replaced in PATCHES.items():
            layer = builder.build(index, tensors)
            with contextlib.ExitStack() as stack:
                for target, replacement in replaced.items():
                    stack.enter_context(patch(target, replacement))
                offset, _ = smooth_k(layer, layer.attention_input(hidden), group_size)
            folded = {n: p.clone() for n, p in layer.module.named_parameters() if n.startswith("self_attn.")}
            found[name].append((folded, offset))
        hidden = layer.forward(hidden)
    return found


def models(source: ModelSource, found: dict[str, Fitted], group_size: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """The unquantised model, and each variant of it."""
    yield "bf16", load_base(source.directory).to(device())
    for name, layers in found.items():
        model = load_base(source.directory).to(device())
        for layer, (folded, offset) in zip(model.model.layers, layers, strict=True):
            layer.load_state_dict(folded, strict=False)
            layer.self_attn.register_buffer(K_OFFSET, offset)
        model.set_attn_implementation(kv4_attention(group_size))
        yield name, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-group-size", type=int, help="default: comet-calibrate's for the model")
    add_arguments(parser)
    args = parser.parse_args()
    with open_model(args.model) as source:
        kv = kv_format(Options(kv_group_size=args.kv_group_size), Dims.of(source.config()))
        tokenizer, length = source.tokenizer(), Options.length
        windows = token_windows(load_text(None, tokenizer), tokenizer, CHUNK_TOKENS // length, length, 0, 2**31)
        evaluate = Evaluator(source, args.text, args.windows, args.tasks)
        result = header(args.name, args.commit) | {"kv_group_size": kv.group_size, "windows": len(evaluate.windows)}
        rows = []
        for name, model in models(source, fit(source, windows, kv.group_size), kv.group_size):
            perplexity = list(evaluate.perplexity(model).values())[-1]
            rows.append({"variant": name, "ppl": perplexity} | evaluate.zeroshot(model))
            print(json.dumps(rows[-1]), flush=True)
            save("kv-cache", result | {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
