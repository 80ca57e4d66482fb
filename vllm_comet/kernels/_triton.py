# SPDX-License-Identifier: Apache-2.0
"""Optional Triton: modules with kernels import it from here, so that they load on machines without Triton or CUDA.

Without Triton, ``triton.jit`` leaves a function as it is; calling a launcher there raises through ``require_triton``.
Importing this module never touches a GPU.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

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

__all__ = ["HAS_TRITON", "Launcher", "cdiv", "require_triton", "tl", "triton"]


def cdiv(a: int, b: int) -> int:
    """``triton.cdiv`` for launchers: Triton's own takes 2.5 us of host time a call."""
    return -(-a // b)


def require_triton(operation: str) -> None:
    """Raise RuntimeError naming ``operation`` if Triton is missing."""
    if not HAS_TRITON:
        raise RuntimeError(f"{operation} on a GPU needs Triton, which is not installed. Install vllm-comet[cuda].")


class Launcher:
    """A kernel with its compile-time parameters and launch options bound: ``launcher(grid, *args)`` launches it.

    Triton's ``kernel[grid](...)`` binds, inspects and hashes every argument and option anew, which takes more host time
    than many of our kernels run. A launcher keeps the compiled kernel for every kind of arguments, told apart by what
    Triton compiles for: dtypes, and whether pointers and integers are multiples of 16, integers 1 or beyond 32 bits.
    Compile-time parameters must come last in the kernel's signature, ``grid`` has three sizes.

    rewrite: text to replace in the kernel's PTX and what takes its place, for instructions that Triton can't emit.
    """

    def __init__(self, kernel: Any, rewrite: tuple[str, str] | None = None, **parameters: Any) -> None:
        self.kernel, self.rewrite, self.parameters = kernel, rewrite, parameters
        self.compiled: dict[tuple, Any] | None = None
        if isinstance(kernel, triton.JITFunction):  # else it is for Triton's interpreter
            self.compiled = {}
            self.constants = [parameters[param.name] for param in kernel.params if param.is_constexpr]
            self.specialize = [not param.do_not_specialize for param in kernel.params if not param.is_constexpr]

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        if self.compiled is None:
            self.kernel[grid](*args, **self.parameters)
            return
        kind: list[Any] = [torch.cuda.current_device()]
        for value, specialize in zip(args, self.specialize, strict=True):
            if isinstance(value, torch.Tensor):
                kind.append(value.dtype)
                kind.append(value.data_ptr() & 15 == 0)
            elif type(value) is not int:
                kind.append(type(value))
            elif specialize:
                kind.append(value if value <= 1 else (value & 15 == 0, value >> 31))
            else:
                kind.append(value >> 31)
        compiled = self.compiled.get(key := tuple(kind))
        if compiled is None:
            compiled = self.compiled[key] = self._compile(grid, args)
        compiled[grid](*args, *self.constants)

    def _compile(self, grid: tuple[int, int, int], args: tuple) -> Any:
        compiled = self.kernel.warmup(*args, grid=grid, **self.parameters)
        if self.rewrite is None:
            return compiled
        if "ptx" not in compiled.asm:
            raise RuntimeError(f"{self.kernel.__name__} needs its PTX, which Triton's cache lacks: unset "
                               "TRITON_STORE_BINARY_ONLY and clear the cache.")
        path = rewrite_ptx(compiled.asm["ptx"], *self.rewrite)
        return self.kernel.warmup(*args, grid=grid, **self.parameters, ir_override=path)


def rewrite_ptx(ptx: str, old: str, new: str) -> str:
    """Path of a file in Triton's cache with ``ptx``, ``old`` replaced, for Triton's ``ir_override`` option."""
    if old not in ptx:
        raise RuntimeError(f"Triton {triton.__version__} compiled a kernel without {old!r}, which was to be replaced.")
    text = ptx.replace(old, new)
    cache = triton.runtime.cache.get_cache_manager(hashlib.sha256(text.encode()).hexdigest())
    return cache.get_file("rewritten.ptx") or cache.put(text, "rewritten.ptx", binary=False)
