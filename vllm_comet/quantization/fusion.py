# SPDX-License-Identifier: Apache-2.0
"""A pass of vLLM's torch.compile pipeline: activation quantisation joins the kernel that makes the activations.

``fused_add_rms_norm → quantize_activation`` becomes ``rms_norm_quantize`` and ``silu(gate) · up → quantize_activation``
becomes ``silu_mul_quantize``, so that the activations of a linear layer are never written in 16 bits. Other inputs
(attention's output, other activation functions) keep the quantisation kernel of their own.
"""

from __future__ import annotations

import functools
import operator
from pathlib import Path

import torch
from torch import fx
from torch._inductor import pattern_matcher as pm
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from vllm.compilation.passes.inductor_pass import InductorPass
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.platforms import current_platform

from vllm_comet.kernels import ops
from vllm_comet.kernels.act_quant import MAX_NORM_K

logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below "vllm"
_QUANTIZE = torch.ops.vllm_comet.quantize_activation.default


def install_fusion(vllm_config: VllmConfig) -> None:
    """Add the pass to the engine's compile passes, once. Only GPU platforms run vLLM's passes."""
    if not current_platform.is_cuda_alike():
        return
    passes = vllm_config.compilation_config.inductor_compile_config
    found = passes.setdefault(current_platform.pass_key, ActivationQuantizationFusion())
    if not isinstance(found, ActivationQuantizationFusion):
        logger.warning_once("COMET: the compile pass %s given in the compilation config takes the place of ours; "
                            "activation quantisation stays a kernel of its own.", type(found).__name__)


class ActivationQuantizationFusion(InductorPass):
    """Rewrites a functional post-grad graph in place; what it leaves unused, vLLM's clean-up removes."""

    def __call__(self, graph: fx.Graph) -> None:
        nodes = graph.find_nodes(op="call_function", target=_QUANTIZE)
        norms = sum(_fuse_norm(graph, node) for node in nodes)
        silus = sum(_fuse_silu(graph, node) for node in nodes)
        if nodes:
            logger.info_once("COMET compile pass: of %d activation quantisations in a graph, %d joined a norm and %d "
                             "SiLU·mul.", len(nodes), norms, silus)

    def uuid(self) -> str:
        return InductorPass.hash_source(Path(__file__).read_text(), Path(ops.__file__).read_text())


def _fuse_norm(graph: fx.Graph, quantize: fx.Node) -> bool:
    """``fused_add_rms_norm`` whose normed output only ``quantize`` reads."""
    normed = quantize.args[0]
    norm = normed.args[0] if _is_item(normed, 0) else None
    if norm is None or norm.target != torch.ops.vllm_ir.fused_add_rms_norm.default or len(normed.users) != 1:
        return False
    x, residual, weight, eps, *variance_size = norm.args
    if norm.kwargs or weight is None or any(variance_size) or weight.meta["val"].numel() > MAX_NORM_K:
        return False
    with graph.inserting_before(norm):  # the residual may be read before `quantize`
        fused = graph.call_function(torch.ops.vllm_comet.rms_norm_quantize.default,
                                    (x, residual, weight, eps, *quantize.args[1:]))
    fused.meta["val"] = (*quantize.meta["val"], norm.meta["val"][1])
    _replace_items(graph, quantize, fused, {0: 0, 1: 1, 2: 2})
    _replace_items(graph, norm, fused, {1: 3})
    return True


def _fuse_silu(graph: fx.Graph, quantize: fx.Node) -> bool:
    """``silu(gate_up[:, :K]) · gate_up[:, K:]`` which only ``quantize`` reads."""
    x = quantize.args[0]
    match = _silu_and_mul().match(x)
    if not match or len(x.users) != 1:
        return False
    gate_up = match.kwargs["gate_up"]
    k = x.meta["val"].shape[1]
    halves = {node.args[2] for node in match.nodes if node.target == torch.ops.aten.slice.Tensor}
    if gate_up.meta["val"].shape[1] != 2 * k or halves != {0, k}:  # the pattern ignores numbers
        return False
    with graph.inserting_before(quantize):
        fused = graph.call_function(torch.ops.vllm_comet.silu_mul_quantize.default, (gate_up, *quantize.args[1:]))
    fused.meta["val"] = quantize.meta["val"]
    _replace_items(graph, quantize, fused, {0: 0, 1: 1, 2: 2})
    return True


@functools.cache
def _silu_and_mul() -> pm.PatternExpr:
    """vLLM's SiluAndMul as post-grad graphs show it, traced so that torch's own decompositions decide."""
    with torch._guards.tracing(None), unset_fake_temporarily(), FakeTensorMode():
        traced = pm.fwd_only(SiluAndMul.forward_native, [torch.empty(5, 8, dtype=torch.bfloat16)])
    return pm.fx_to_pattern(traced, argnames=["gate_up"], ignore_types=(int, float, list, torch.device, torch.dtype))


def _replace_items(graph: fx.Graph, old: fx.Node, new: fx.Node, indices: dict[int, int]) -> None:
    """Item ``indices[i]`` of ``new`` takes the place of item i of ``old``, which dies by dead-code elimination."""
    for item in [user for user in old.users if user.args[1] in indices]:
        with graph.inserting_after(new):
            replacement = graph.call_function(operator.getitem, (new, indices[item.args[1]]))
        replacement.meta.update(item.meta)
        item.replace_all_uses_with(replacement)
        graph.erase_node(item)


def _is_item(node: fx.Node, index: int) -> bool:
    return node.target == operator.getitem and node.args[1] == index
