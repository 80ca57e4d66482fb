# SPDX-License-Identifier: Apache-2.0
"""What each part of the calibrator is worth: it is run with and without, and each checkpoint is measured, as JSON.

    python examples/ablation.py MODEL --text wikitext2_test.raw.txt --name smollm2-135m --jobs 8

MODEL is a Hugging Face folder, hub id or .gguf file. The default is calibrated first, where it or the INT8 shares and
tuning that start from it are asked for; then the variants run side by side in ``--jobs`` processes, and rows are
written as they come. ``--start CHECKPOINT``, made with the same settings, saves that first calibration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import Evaluator, add_arguments, device, header, save
from safetensors.torch import load_file

from calibrate.data import load_text, token_windows
from calibrate.export import REPORT
from calibrate.fmpq import Candidate, act_bits, allocate
from calibrate.gptq import Compensation
from calibrate.grid import round_to_grid
from calibrate.loading import ModelSource, open_model
from calibrate.models import LINEAR_INPUTS, Dims
from calibrate.pipeline import BUDGET_ERROR, Options, calibrate
from calibrate.simulate import Activations, load_base, load_comet
from calibrate.tune import TuneOptions, tune_checkpoint
from vllm_comet import checkpoint as fmt

MODES: dict[str, tuple[Activations, bool]] = {
    "W4": ("none", False), "W4 KV4": ("none", True), "W4A8": ("int8", False), "W4A8KV4": ("int8", True),
    "W4AxKV4": ("mixed", True)}
SHARES = (0.0, 0.08, 0.16, 0.25, 0.5, 1.0)
MIXED = ("W4A8KV4", "W4AxKV4")


@dataclass(frozen=True)
class Variant:
    """options: of the calibrator. patches: what is replaced in it and in the measured model, by dotted name. share:
    INT8 share given to a finished checkpoint; tune: settings of :class:`TuneOptions` for one. modes: that are measured;
    task_modes: those of them that answer the tasks.
    """

    options: dict[str, Any] = field(default_factory=dict)
    patches: dict[str, Any] = field(default_factory=dict)
    share: float | None = None
    tune: dict[str, Any] | None = None
    modes: tuple[str, ...] = tuple(MODES)
    task_modes: tuple[str, ...] = ("W4A8KV4",)

    @property
    def from_default(self) -> bool:
        """Whether it is made from the default's checkpoint, without a calibration of its own."""
        return not self.options and not self.patches


def _unordered(hessian: torch.Tensor, damping: float, name: str, of: Callable = Compensation.of) -> Compensation:
    """Compensation without act-order: descending diagonals would keep the stored order."""
    with patch("calibrate.gptq.torch.argsort", lambda d, **_: torch.arange(len(d), device=d.device)):
        return of(hessian, damping, name)


def _diagonal(hessian: torch.Tensor, damping: float, name: str, of: Callable = Compensation.of) -> Compensation:
    """Compensation whose importance leaves out that errors are compensated."""
    return replace(of(hessian, damping, name), importance=hessian.diagonal().clone())


VARIANTS: dict[str, Variant] = {
    "default": Variant(task_modes=MIXED),
    "rounding to nearest": Variant(patches={"calibrate.rows.gptq": lambda w, _, grid: round_to_grid(w, grid),
                                            "calibrate.layer.Compensation.of": _diagonal,
                                            "calibrate.rows.SWEEPS": 0}),
    "no corrected targets": Variant(patches={"calibrate.gptq.CORRECTION": 0.0}),
    "targets corrected in full": Variant(patches={"calibrate.gptq.CORRECTION": 1.0}),
    "targets corrected by a quarter": Variant(patches={"calibrate.gptq.CORRECTION": 0.25}),
    "damping 0.01": Variant({"damping": 0.01}),
    "damping 0.3": Variant({"damping": 0.3}),
    "three times the samples": Variant({"samples": 384}),
    "no act-order": Variant(patches={"calibrate.layer.Compensation.of": _unordered}),
    "no coordinate descent": Variant(patches={"calibrate.rows.SWEEPS": 0}),
    "scales by the Hessian's diagonal": Variant(patches={"calibrate.layer.Compensation.of": _diagonal}),
    "no scale search": Variant(patches={"calibrate.grid._SHRINK": 0, "calibrate.grid._GROW": 0}),
    "no refitted rows": Variant(patches=dict.fromkeys(("calibrate.rows.refit_rows", "calibrate.gptq.refit_rows"),
                                                      lambda w, h, grid, codes: grid)),
    "no K offset": Variant(patches={"calibrate.kv_smooth.common_key": lambda _, k: torch.zeros_like(k[0, :, 0])}),
    "no K smoothing": Variant(patches={"calibrate.kv_smooth._STEPS": 0}),
    "K smoothing as if no channel were exact": Variant(patches={"calibrate.kv_smooth._exact": lambda *_: 0.0}),
    "K smoothing in 600 steps": Variant(patches={"calibrate.kv_smooth._STEPS": 600}),
    "INT8 blocks by each linear's own error": Variant(patches={"calibrate.pipeline.BUDGET_ERROR": "mixed_error"},
                                                      task_modes=MIXED),
    "INT4 activations not clipped": Variant(patches={"vllm_comet.kernels.act_quant.CLIP": 1.0}, modes=MIXED,
                                            task_modes=MIXED),
    "weight groups of 128": Variant({"group_size": 128}),
    "KV groups of 128": Variant({"kv_group_size": 128}),
    "KV groups of 64": Variant({"kv_group_size": 64}),
    "KV groups of 32": Variant({"kv_group_size": 32}),
    "--rotate heads": Variant({"rotation": "heads"}),
    "--rotate all": Variant({"rotation": "all"}),
    "--tune 96": Variant(tune={"steps": 96}),
    "--tune 96, int8 steps only": Variant(tune={"steps": 96, "mixed_share": 0.0}),
    "--tune 96, int8 steps only, codes too": Variant(tune={"steps": 96, "mixed_share": 0.0, "code_rate": 0.003}),
    "--tune 288, int8 steps only, codes too": Variant(tune={"steps": 288, "mixed_share": 0.0, "code_rate": 0.003}),
    **{f"INT8 share {share:g}": Variant(share=share, modes=MIXED[1:], task_modes=MIXED[1:]) for share in SHARES},
}


def give_share(directory: Path, dims: Dims, share: float) -> None:
    """Spend another INT8 budget in a finished checkpoint."""
    comet = fmt.CometFormat.from_dict(json.loads((directory / "config.json").read_text())["quantization_config"])
    reports = json.loads((directory / REPORT).read_text())["layers"]
    places = [(f"model.layers.{n}", i) for n in range(len(reports)) for i in LINEAR_INPUTS]
    candidates = [Candidate(dims.width(i), len(i.members), comet.tensor_parallel if i.row_parallel else 1,
                            tuple(report[i.name][BUDGET_ERROR])) for report in reports for i in LINEAR_INPUTS]
    bits = {f"{layer}.{member}.{fmt.ACT_BITS_NAME}": act_bits(c.k, c.slices, count)
            for (layer, i), c, count in zip(places, candidates, allocate(candidates, share), strict=True)
            for member in i.members}
    for path in directory.glob("*.safetensors"):
        fmt.save_shard({name: bits.get(name, tensor) for name, tensor in load_file(path).items()}, path)


def options(args: argparse.Namespace, **changed: Any) -> Options:
    return Options(**{"data": args.data, "length": args.length, **changed})


def make(source: ModelSource, variant: Variant, args: argparse.Namespace, out: Path) -> None:
    """Calibrate as ``variant`` says, or change a copy of the default's checkpoint."""
    if variant.from_default:
        shutil.copytree(args.start, out)
    else:
        calibrate(source, out, options(args, **variant.options))
    if variant.share is not None:
        give_share(out, Dims.of(source.config()), variant.share)
    if variant.tune is not None:
        tokenizer = source.tokenizer()
        windows = token_windows(load_text(args.data, tokenizer), tokenizer, None, args.length, 0, 2**31)
        tune_checkpoint(source.directory, out, windows, TuneOptions(**variant.tune), device())


def run(name: str, model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One row: perplexity by mode, on the text and on ``--valid``, and the zero-shot mean by mode."""
    torch.set_num_threads(1 if args.jobs > 1 else torch.get_num_threads())
    source, start = ModelSource(model), time.monotonic()
    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    evaluate = Evaluator(source, args.text, args.windows, args.tasks)
    row: dict[str, Any] = {"variant": name, "windows": len(evaluate.windows), "ppl": {}, "valid_ppl": {}}
    choose = Evaluator(source, args.valid, args.valid_windows, None) if args.valid else None
    variant = VARIANTS.get(name)
    with tempfile.TemporaryDirectory(prefix="comet-ablation-") as folder, contextlib.ExitStack() as stack:
        for target, replacement in (variant.patches if variant is not None else {}).items():
            stack.enter_context(patch(target, replacement))
        checkpoint = Path(folder) / "checkpoint"
        if variant is not None:
            make(source, variant, args, checkpoint)
            row["int8_share"] = round(fmt.verify_checkpoint(checkpoint).int8_share, 4)
            row["seconds"] = round(time.monotonic() - start)
        for mode in variant.modes if variant is not None else ("bf16",):
            network = (load_base(model, dtype) if variant is None else load_comet(checkpoint, *MODES[mode], dtype))
            network = network.to(device())
            row["ppl"][mode] = list(evaluate.perplexity(network).values())[-1]
            if choose is not None:
                row["valid_ppl"][mode] = list(choose.perplexity(network).values())[-1]
            if args.tasks and (variant is None or mode in variant.task_modes):
                row.setdefault("zeroshot_mean", {})[mode] = evaluate.zeroshot(network)["zeroshot_mean"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="calibration text (default: comet-calibrate's)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--valid", type=Path, help="text to choose variants by, read as WikiText rows")
    parser.add_argument("--valid-windows", type=int, default=20)
    parser.add_argument("--start", type=Path, help="checkpoint of the default variant")
    parser.add_argument("--only", nargs="+", choices=["bf16", *VARIANTS], default=["bf16", *VARIANTS])
    parser.add_argument("--jobs", type=int, default=1, help="variants at a time (default: %(default)s)")
    add_arguments(parser)
    args = parser.parse_args()
    result, rows = header(args.name, args.commit), []
    with (open_model(args.model) as source, tempfile.TemporaryDirectory(prefix="comet-ablation-") as folder,
          ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool):
        if args.start is None and any(name in VARIANTS and VARIANTS[name].from_default for name in args.only):
            args.start = Path(folder) / "default"
            calibrate(source, args.start, options(args))
        longest_first = sorted(args.only, key=lambda name: name not in VARIANTS or VARIANTS[name].tune is None)
        tasks = {pool.submit(run, name, source.directory, args): name for name in longest_first}
        for task in as_completed(tasks):
            failure = task.exception()
            row = {"variant": tasks[task], "failed": repr(failure)[:300]} if failure else task.result()
            rows.append(row)
            print(json.dumps(row), flush=True)
            rows.sort(key=lambda r: args.only.index(r["variant"]))
            save("ablation", result | {"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
