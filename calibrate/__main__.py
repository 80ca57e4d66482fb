# SPDX-License-Identifier: Apache-2.0
"""Command line of the calibrator: ``comet-calibrate MODEL --out DIR``, the same as ``python -m calibrate``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from calibrate.errors import CalibrationError
from vllm_comet.checkpoint import GROUP_SIZES, KV_GROUP_SIZES, CheckpointError


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("comet-calibrate", description="Quantise a model into a COMET checkpoint.")
    parser.add_argument("model", help="Hugging Face folder, hub id, or .gguf file")
    parser.add_argument("--out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--data", type=Path, help="calibration text, .txt or .jsonl (default: the text shipped here)")
    parser.add_argument("--samples", type=_positive, help="how many (default: what the text gives, at most 128)")
    parser.add_argument("--length", type=_positive, default=1024, help="tokens of a sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default: %(default)s)")
    parser.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=64, help="channels of a weight scale; "
                        "-1: the whole row (default: %(default)s)")
    parser.add_argument("--int8-share", type=_share, default=0.16, help="most of all channels that may stay INT8 "
                        "(default: %(default)s)")
    parser.add_argument("--kv-group-size", type=int, choices=KV_GROUP_SIZES, help="channels of a KV scale "
                        "(default: 128 for heads of 128, else 32)")
    parser.add_argument("--no-kv4", action="store_true", help="leave the KV cache in bf16")
    parser.add_argument("--tensor-parallel", type=_positive, help="largest tensor-parallel size to serve at (default: "
                        "what the shapes allow, at most 8)")
    parser.add_argument("--damping", type=float, default=0.1, help="added to the Hessian's diagonal, as a share "
                        "of its mean (default: %(default)s)")
    parser.add_argument("--rotate", choices=("none", "heads", "all"), default="none", help="spread outliers by an "
                        "exact rotation: of V in each head, or also of the residual stream (default: %(default)s)")
    parser.add_argument("--tune", type=_positive, metavar="STEPS", default=0, help="experimental: then train scales "
                        "and norms end to end against the original model, about a hundred steps; holds both models in "
                        "memory, for a GPU")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="hidden states stay on the GPUs as far as "
                        "this much of each leaves room for a layer's work (default: 24, or most of a smaller GPU)")
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="hidden states beyond this go to files in "
                        "OUT.partial (default: half of the memory)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--dry-run", action="store_true", help="print the plan (layers, sizes, memory, time) and stop")
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out is needed")
    return args


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors a user can cause end in one line on stderr."""
    args = parse_args(argv)
    try:
        return _run(args)
    except (CalibrationError, CheckpointError, OSError) as error:  # OSError: disk full, no permission
        print(f"comet-calibrate: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _is_environment_error(error):
            raise
        print(f"comet-calibrate: error: {str(error).splitlines()[0]} {args.out} was not written; continue with "
              "--resume when there is room.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = f"; {args.out} was not written. Continue with --resume" if args.out else ""
        print(f"\ncomet-calibrate: interrupted{left}.", file=sys.stderr)
        return 130


def _is_environment_error(error: Exception) -> bool:
    """Disk full while writing tensors, or a GPU without enough memory: named by the libraries, not by OSError."""
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    return isinstance(error, (SafetensorError, OutOfMemoryError))


def _run(args: argparse.Namespace) -> int:
    from calibrate.export import finish_interrupted
    from calibrate.loading import open_model
    from calibrate.pipeline import Options, calibrate, prepare
    from calibrate.plan import Limits, Rates, describe

    options = Options(
        data=args.data, samples=args.samples, length=args.length, seed=args.seed, group_size=args.group_size,
        int8_share=args.int8_share, kv4=not args.no_kv4, kv_group_size=args.kv_group_size,
        tensor_parallel=args.tensor_parallel, damping=args.damping, rotation=args.rotate, tune=args.tune)
    limits = Limits(_bytes(args.gpu_memory), _bytes(args.host_memory))
    if args.dry_run:
        with open_model(args.model) as source:
            plan, _ = prepare(source, options, limits)
        print(describe(plan, Rates.of(plan.device)))
        return 0
    if args.resume and finish_interrupted(args.out):
        print(f"{args.out} is finished: every checksum is right. Serve it with: vllm serve {args.out}")
        return 0
    start = time.monotonic()
    with open_model(args.model) as source:
        result = calibrate(source, args.out, options, args.resume, limits)
    from calibrate.report import summary

    print(summary(result, args.out, time.monotonic() - start))
    return 0


if __name__ == "__main__":
    sys.exit(main())
