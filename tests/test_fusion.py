# SPDX-License-Identifier: Apache-2.0
"""The compile pass that fuses activation quantisation: on graphs as Inductor sees them, run on the CPU."""

import operator

import pytest
import torch
import torch._inductor.pattern_matcher as pm

pytest.importorskip("vllm")
import vllm.ir.ops  # noqa: E402, F401
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402

from vllm_comet.kernels.act_quant import code_sums_ref  # noqa: E402
from vllm_comet.quantization.fusion import ActivationQuantizationFusion  # noqa: E402

K, SPLIT = 256, 128
OPS = torch.ops.vllm_comet


def norm_quantize(x, residual, weight, perm):
    normed, added = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-5)
    return (*OPS.quantize_activation(normed, perm, SPLIT, 8), added)


def norm_read_twice(x, residual, weight, perm):
    normed, added = torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, 1e-5)
    return (*OPS.quantize_activation(normed, perm, SPLIT, 8), added, normed)


def silu_quantize(gate_up):
    return OPS.quantize_activation(SiluAndMul.forward_native(gate_up), None, SPLIT, 4)


def silu_of_other_halves(gate_up):
    gate, up = gate_up[:, :K], gate_up[:, 1 : K + 1]
    return OPS.quantize_activation(torch.nn.functional.silu(gate) * up, None, SPLIT, 4)


def inputs(function):
    torch.manual_seed(0)
    rows = [torch.randn(5, K, dtype=torch.bfloat16) for _ in range(2)]
    if "norm" in function.__name__:
        return [*rows, torch.rand(K, dtype=torch.bfloat16), torch.randperm(K, dtype=torch.int32)]
    return [torch.randn(5, 2 * K, dtype=torch.bfloat16)]


def graph_of(function, arguments):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module = pm.fwd_only(function, [mode.from_tensor(a) for a in arguments])
    ActivationQuantizationFusion()(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module, {node.target for node in module.graph.nodes if node.target != operator.getitem}


@pytest.mark.parametrize(
    ("function", "fused"),
    [(norm_quantize, OPS.rms_norm_quantize.default), (silu_quantize, OPS.silu_mul_quantize.default)],
)
def test_quantisation_joins_the_kernel_before_it(function, fused):
    arguments = inputs(function)
    module, targets = graph_of(function, arguments)
    assert fused in targets
    assert OPS.quantize_activation.default not in targets
    assert not targets & {torch.ops.vllm_ir.fused_add_rms_norm.default, torch.ops.aten.mul.Tensor}
    codes, scales, sums, *added = module(*arguments)
    want_codes, want_scales, _, *want_added = function(*arguments)
    # the fused kernel quantises the float32 value, the unfused one its rounding to bf16: half a code at 2**-8 relative
    assert (codes.int() - want_codes.int()).abs().max() <= 1
    torch.testing.assert_close(scales, want_scales, rtol=2**-7, atol=0)
    assert torch.equal(sums, code_sums_ref(codes, SPLIT))
    assert all(torch.equal(a, b) for a, b in zip(added, want_added, strict=True))


@pytest.mark.parametrize("function", [norm_read_twice, silu_of_other_halves])
def test_other_graphs_stay_as_they_are(function):
    arguments = inputs(function)
    module, targets = graph_of(function, arguments)
    assert OPS.quantize_activation.default in targets
    for got, want in zip(module(*arguments), function(*arguments), strict=True):
        assert torch.equal(got, want)
