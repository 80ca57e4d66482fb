# SPDX-License-Identifier: Apache-2.0
"""Sequential rounding: what it does to one row by hand, and the Triton kernel against torch (on a CPU in Triton's
interpreter, in a process of its own)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from calibrate.rounding import COLUMNS, _round_columns_torch, _round_columns_triton, round_columns

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows: int, columns: int) -> list[torch.Tensor]:
    """values, steps, coupling, before."""
    draw = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(rows, columns, generator=draw)
    steps = 0.5 + torch.rand(rows, columns, generator=draw)
    coupling = 0.1 * torch.randn(columns, columns, generator=draw)
    return [t.to(DEVICE) for t in (values, steps, coupling, values + 0.2 * torch.randn(rows, columns, generator=draw))]


def test_a_change_moves_the_columns_after_it():
    codes, changes = round_columns(torch.tensor([[1.6, 1.4, -30.0]]), torch.tensor([[1.0, 2.0, 1.0]]),
                                   torch.tensor([[9.0, 1.0, 0.0], [9.0, 9.0, 0.0], [9.0, 9.0, 9.0]]), None)
    assert codes.tolist() == [[2, 0, -8]]  # 1.4 - 0.4 = 1.0, half a step, to even
    torch.testing.assert_close(changes, torch.tensor([[0.4, -1.0, 22.0]]))


@pytest.mark.skipif(not (INTERPRET or DEVICE == "cuda"), reason="needs a GPU or Triton's interpreter")
@pytest.mark.parametrize(("rows", "columns"), [(40, COLUMNS), (16, 64), (7, 24)])
@pytest.mark.parametrize("has_before", [False, True])
def test_kernel_agrees_with_torch(rows, columns, has_before):
    values, steps, coupling, before = problem(rows, columns)
    before = before if has_before else None
    codes, changes = _round_columns_torch(values, steps, coupling, before)
    found_codes, found_changes = _round_columns_triton(values, steps, coupling, before)
    same = found_codes == codes
    assert float(same.float().mean()) > 0.99  # a sum in another order may tip a code
    torch.testing.assert_close(found_changes[same.all(1)], changes[same.all(1)], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRET or DEVICE == "cuda", reason="the kernel is tested in this process")
def test_in_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "kernel", __file__],
                            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("has_before", [False, True])
def test_kernel_compiles(capability, has_before):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from calibrate.rounding import _ROWS, _round_columns_kernel

    constants = {"ROWS": _ROWS, "COLUMNS": COLUMNS, "HAS_BEFORE": has_before}
    if not has_before:
        constants["before_ptr"] = None
    names = _round_columns_kernel.arg_names
    signature = {n: "constexpr" if n in constants else "*fp32" if n.endswith("_ptr") else "i32" for n in names}
    source = ASTSource(_round_columns_kernel, signature, {(names.index(n),): v for n, v in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
