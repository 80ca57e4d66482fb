# SPDX-License-Identifier: Apache-2.0
"""Command line: ``comet-eval BASE CANDIDATE… --out DIR``, the same as ``python -m calibrate.evaluate``."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from calibrate.errors import CalibrationError
from calibrate.evaluate.errors import EvaluationError
from vllm_comet.checkpoint import CheckpointError

DESCRIPTION = """Compare a base model with candidates that could replace it: accuracy, text, cost, and what to serve.

A model is [LABEL=]MODEL[@MODE]: a folder, hub id or .gguf file. MODE, for a COMET checkpoint: auto (default), int8,
mixed or weights (simulation only), and kv16 (no 4-bit KV cache), joined by commas; for any model NAME=VALUE, an engine
argument of vLLM. dummy:SHAPE:FORMAT has random weights, for --cost-only: a shape and format of comet-bench serve."""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("comet-eval", description=DESCRIPTION,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the model that the others are measured against")
    parser.add_argument("candidates", nargs="*", metavar="candidate", help="at least one, but for --cost-only")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.json, report.md and report.html")
    parser.add_argument("--cache", type=Path, help="folder of answers, shared between reports (default: OUT/cache)")
    parser.add_argument("--seed", type=int, default=0, help="draws items, resamples, arrivals (default: %(default)s)")
    _accuracy_arguments(parser.add_argument_group("accuracy"))
    _cost_arguments(parser.add_argument_group("cost"))
    args = parser.parse_args(argv)
    if not args.candidates and not args.cost_only:
        parser.error("name at least one candidate to compare with the base")
    return args


def _accuracy_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", type=_names, help="NAME,… for NAME.jsonl in --data; lm-eval:NAME for "
                       "lm-evaluation-harness's (default: every file of --data that fits the schema)")
    group.add_argument("--data", type=Path, help="folder of task files")
    group.add_argument("--limit", type=_positive, help="items of a task (default: all)")
    group.add_argument("--ppl", nargs="+", default=[], metavar="FILE", help="texts for perplexity; wikitext:FILE reads "
                       "a raw WikiText file the way published numbers do")
    group.add_argument("--windows", type=_positive, default=20, help="of a text (default: %(default)s)")
    group.add_argument("--window-length", type=_positive, default=2048, help="tokens (default: %(default)s)")
    group.add_argument("--prompts", type=Path, help="JSONL with prompt, turns or messages (default: a shipped set)")
    group.add_argument("--prompt-limit", type=int, metavar="N", help="take the first N prompts; 0: compare no text")
    group.add_argument("--answer-tokens", type=_positive, default=128, help="of an answer (default: %(default)s)")
    group.add_argument("--backend", choices=("torch", "vllm"), default="torch", help="torch simulates a COMET "
                       "checkpoint by the reference, vllm runs what is served (default: %(default)s)")
    group.add_argument("--device", help="for torch (default: cuda if there is one)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), help="for torch (default: float32 on a CPU, "
                       "bfloat16 on a GPU)")
    group.add_argument("--min-recovery", type=float, default=99.0, metavar="PERCENT", help="accuracy that a "
                       "recommendation must keep (default: %(default)s)")


def _cost_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--serve", action="store_true", help="measure cost with vLLM on this machine's device")
    group.add_argument("--cost-only", action="store_true", help="cost and nothing else")
    group.add_argument("--use-cases", type=_names, default=[], metavar="NAME,…", help="default: all seven")
    group.add_argument("--length-scale", type=float, default=1.0, help="times the use cases' lengths, for slow devices")
    group.add_argument("--queries", type=_positive, default=8, help="synchronous ones (default: %(default)s)")
    group.add_argument("--trial-seconds", type=float, default=20.0, help="least length of a trial at one rate "
                       "(default: %(default)s)")
    group.add_argument("--trials", type=_positive, default=8, help="most rates to try (default: %(default)s)")
    group.add_argument("--ttft-ms", type=float, default=2000, help="90th percentile's limit (default: %(default)s)")
    group.add_argument("--itl-ms", type=float, default=50, help="90th percentile's limit (default: %(default)s)")
    group.add_argument("--gpu-price", type=float, default=3.29, help="dollars an hour of one device "
                       "(default: %(default)s, an H100 in the paper)")
    group.add_argument("--engine", type=_option, action="append", default=[], metavar="NAME=VALUE",
                       help="engine argument of vLLM for all models, e.g. load_format=dummy; repeatable")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _option(text: str) -> tuple[str, Any]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def command(argv: list[str]) -> str:
    """The command line with the names of files and folders in place of their absolute paths."""
    path = re.compile(r"(?<![^=:@,])/(?:[^/=@:,]+/)*([^/=@:,]+)")
    return shlex.join(["comet-eval", *(path.sub(r"\1", word) for word in argv)])


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code. Errors a user can cause end in one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        return _run(args, command(argv))
    except (EvaluationError, CalibrationError, CheckpointError, OSError) as error:
        print(f"comet-eval: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ncomet-eval: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace, command: str) -> int:
    import torch

    from calibrate.evaluate.report import write_report
    from calibrate.evaluate.run import Options, evaluate

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    given = {name: value for name, value in vars(args).items()
             if name not in ("base", "candidates", "ttft_ms", "itl_ms", "device", "dtype", "engine")}
    options = Options(
        **given, models=[args.base, *args.candidates], ttft=args.ttft_ms / 1e3, itl=args.itl_ms / 1e3, device=device,
        dtype=args.dtype or ("bfloat16" if device.startswith("cuda") else "float32"), engine=dict(args.engine))
    print(write_report(evaluate(options) | {"command": command}, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
