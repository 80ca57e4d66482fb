# SPDX-License-Identifier: Apache-2.0
"""The launcher compiles once for each kind of arguments that Triton would compile for, and launches that."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from kernel_testing import INTERPRET, needs_gpu  # noqa: E402

from vllm_comet.kernels._triton import Launcher, tl  # noqa: E402


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(x_ptr, y_ptr, bias_ptr, factor, count, N: tl.constexpr, BIAS: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    if BIAS:
        x += tl.load(bias_ptr + at, mask=at < count, other=0.0)
    tl.store(y_ptr + at, x * factor, mask=at < count)


class Compiled:
    """Stands for Triton's compiled kernel: records its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


@pytest.fixture
def launcher(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launcher = Launcher(_scale_kernel, N=64, BIAS=False, num_warps=1)
    monkeypatch.setattr(launcher, "_compile", lambda grid, args: Compiled())
    return launcher


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_kinds(launcher):
    x = torch.zeros(65)
    same = [(x, x, None, 32, 5), (x[4:], x, None, 48, 6)]  # count isn't specialised
    others = [
        (x[1:], x, None, 32, 5), (x, x[1:], None, 32, 5), (x.double(), x, None, 32, 5), (x, x, x, 32, 5),
        (x, x, None, 1, 5), (x, x, None, 0, 5), (x, x, None, 33, 5), (x, x, None, 1 << 33, 5),
        (x, x, None, 32, 1 << 33), (x, x, None, 32.0, 5),
    ]  # fmt: skip
    for args in same:
        launcher((1, 1, 1), *args)
    (compiled,) = launcher.compiled.values()
    assert [launch[1][:2] for launch in compiled.launches] == [args[:2] for args in same]
    assert compiled.launches[0] == ((1, 1, 1), (*same[0], 64, False))  # compile-time parameters in their order
    for i, args in enumerate(others):
        launcher((1, 1, 1), *args)
        assert len(launcher.compiled) == i + 2, args


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_wrong_number_of_arguments(launcher):
    with pytest.raises(ValueError):
        launcher((1, 1, 1), torch.zeros(1), torch.zeros(1))


@pytest.mark.skipif(INTERPRET, reason="the interpreter compiles nothing")
def test_rewriting_needs_ptx(monkeypatch):
    launcher = Launcher(_scale_kernel, ("mul", "add"), N=64, BIAS=False)
    monkeypatch.setattr(_scale_kernel, "warmup", lambda *args, **options: SimpleNamespace(asm={"cubin": b""}))
    with pytest.raises(RuntimeError, match="_scale_kernel needs its PTX.*unset TRITON_STORE_BINARY_ONLY"):
        launcher._compile((1, 1, 1), ())


@needs_gpu
def test_launch():
    launcher = Launcher(_scale_kernel, N=64, BIAS=True, num_warps=1)
    x, bias = torch.randn(65, device="cuda"), torch.randn(65, device="cuda")
    for first in (0, 1, 4, 0):
        y = torch.full_like(x, float("nan"))
        launcher((1, 1, 1), x[first:], y[first:], bias, 3, 50)
        assert torch.equal(y[first : first + 50], (x[first : first + 50] + bias[:50]) * 3)
    assert len(launcher.compiled) == 2
