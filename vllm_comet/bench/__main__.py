# SPDX-License-Identifier: Apache-2.0
"""``comet-bench SUBCOMMAND``: dispatches lazily, so that one benchmark's needs are not another's."""

from __future__ import annotations

import importlib
import sys

SUBCOMMANDS = {
    "gemm": "W4Ax GEMM and activation quantisation beside cuBLAS and vLLM's quantised linear layers",
    "tune": "search the GEMM tile table of this GPU",
    "attention": "attention over the 4-bit KV cache beside FlashAttention",
    "serve": "whole-model serving beside every mode vLLM ships",
    "load": "time and GPU memory of loading a COMET checkpoint and vLLM's W4A16 one",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, SUBCOMMANDS))
        print("usage: comet-bench SUBCOMMAND [options]\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in SUBCOMMANDS.items()))
        return 0 if argv else 2
    if argv[0] not in SUBCOMMANDS:
        print(f"comet-bench: unknown subcommand {argv[0]!r}; one of {', '.join(SUBCOMMANDS)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"vllm_comet.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
