# SPDX-License-Identifier: Apache-2.0
"""Optional Triton: modules with kernels import it from here, so that they load on machines without Triton or CUDA.

Without Triton, ``triton.jit`` leaves a function as it is; calling a launcher there raises through ``require_triton``.
Importing this module never touches a GPU.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # the calibrator and the CPU path need only the torch references

    class _Placeholder:
        """Stands for a Triton module while kernels are defined: any attribute is another placeholder."""

        def __getattr__(self, name: str) -> Any:
            return _Placeholder()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = _Placeholder()
    HAS_TRITON = False

__all__ = ["HAS_TRITON", "cdiv", "require_triton", "tl", "triton"]


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` for launchers: Triton's own takes 2.5 us of host time a call."""
    return -(-a // b)


def require_triton(operation: str) -> None:
    """Raise RuntimeError naming ``operation`` if Triton is missing."""
    if not HAS_TRITON:
        raise RuntimeError(f"{operation} on a GPU needs Triton, which is not installed. Install vllm-comet[cuda].")
