# SPDX-License-Identifier: Apache-2.0
"""End-to-end tuning: the quantised model is trained to predict what the original predicts.

Calibration sees one layer at a time and stops at its squared error. Tuning sees the whole model: it lowers the KL
divergence between the two models' next-token distributions on the calibration text, with weights, activations and KV
cache rounded as they are when served (rounding passes gradients straight through, Bengio et al. 2013; distillation
instead of the labels follows LLM-QAT, Liu et al. 2023). Steps take the precision of the activations in turn, so one
checkpoint serves ``int8`` and ``mixed``. What is trained is what the checkpoint stores as floats, row scales, norms and
biases, and if asked for the codes; group scales, permutations, block precisions, embedding and head stay.

It holds the model in memory, twice (about 8 bytes a weight, 16 with codes), so it is meant for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tqdm import trange
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from calibrate.decoder import round_trip_kv
from calibrate.errors import CalibrationError
from calibrate.fused import merge_stored, split_tensors
from calibrate.grid import HIGH, LOW
from calibrate.models import Dims, family_of
from calibrate.simulate import load_comet, read_tensors
from calibrate.stats import products_of_bf16
from vllm_comet import checkpoint as fmt
from vllm_comet.kernels.act_quant import QMAX, TINY, align_scales, step_of

_HEAD_TOKENS = 1024
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True)
class TuneOptions:
    """steps: of Adam. tokens: of a step. code_rate, scale_rate, norm_rate: first learning rates of the codes (in units
    of one code), of the row scales and of norms and biases (both relative); they fall to zero along a cosine.
    mixed_share: of the steps that are taken in ``mixed`` mode. recompute: keep only each layer's input for the backward
    pass, a third slower."""

    steps: int = 256
    tokens: int = 4096
    code_rate: float = 0.0
    scale_rate: float = 1e-3
    norm_rate: float = 1e-3
    mixed_share: float = 0.5
    recompute: bool = True
    seed: int = 0


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()


class TunableLinear(torch.nn.Module):
    """A comet linear with trainable codes and row scales; computes in float32 what the served layer computes.

    Channels are in the model's order, so nothing is gathered: a mask tells the two activation segments apart.
    tensors: the stored tensors by suffix; bias ``[N]`` or None.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None, group_size: int):
        super().__init__()
        stored = fmt.unpack_int4(tensors[fmt.WEIGHT_PACKED]).to(torch.float32) + LOW
        n, k = stored.shape
        perm = tensors.get(fmt.INPUT_PERM)
        perm = torch.arange(k) if perm is None else perm.to(torch.int64)
        group = tensors.get(fmt.WEIGHT_GROUP_SCALE)
        steps = torch.full((n, k), 16, dtype=torch.uint8) if group is None else (
            group.repeat_interleave(group_size, dim=1)[:, :k])
        low = tensors[fmt.ACT_BITS_NAME].repeat_interleave(fmt.BLOCK)[:k] == 4
        inverse = torch.argsort(perm)
        self.codes = torch.nn.Parameter(stored[:, inverse].contiguous())
        self.log_gain = torch.nn.Parameter(torch.zeros(n))
        self.bias = None if bias is None else torch.nn.Parameter(bias.to(torch.float32))
        self.low_bits = 8
        self.register_buffer("perm", perm)
        self.register_buffer("scale", tensors[fmt.WEIGHT_SCALE].to(torch.float32))
        self.register_buffer("steps", steps[:, inverse].contiguous())
        self.register_buffer("low", low[inverse])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = self.codes.clamp(LOW, HIGH)
        codes = straight_through(codes, codes.round())
        weight = codes * self.steps * (self.scale * self.log_gain.exp()).unsqueeze(1)
        x = x.to(torch.float32)
        return F.linear(straight_through(x, self._round_trip(x)), weight, self.bias)

    @torch.no_grad()
    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        """What ``quantize_activation_ref`` keeps of ``x`` ``[..., K]``."""
        rows = x.flatten(0, -2)
        low = torch.where(self.low, rows, 0).abs().amax(-1) * step_of(self.low_bits)
        high = torch.where(self.low, 0, rows).abs().amax(-1) * step_of(8)
        scales = align_scales(low, high, self.low_bits).clamp_min(TINY)
        scale = torch.where(self.low, scales[:, :1], scales[:, 1:])
        largest = torch.where(self.low, QMAX[self.low_bits], QMAX[8])
        return rows.div(scale).round_().clamp_(-largest, largest).mul_(scale).view_as(x)

    @torch.no_grad()
    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors that tuning changed, by suffix, on the CPU."""
        codes = (self.codes.clamp(LOW, HIGH).round() - LOW).to(torch.uint8)[:, self.perm]
        changed = {fmt.WEIGHT_PACKED: fmt.pack_int4(codes.cpu()),
                   fmt.WEIGHT_SCALE: (self.scale * self.log_gain.exp()).cpu()}
        return changed if self.bias is None else changed | {"bias": self.bias.to("cpu", torch.bfloat16)}


def tune_checkpoint(
    base: Path, directory: Path, windows: torch.Tensor, options: TuneOptions, device: torch.device
) -> float:
    """Tune the checkpoint in ``directory`` against the model in ``base``, in place; returns the last mean KL."""
    student = load_tunable(directory).to(device)
    teacher = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).requires_grad_(False).eval().to(device)
    divergence = tune(student, teacher, windows, options)
    save_tuned(student, directory)
    return divergence


def load_tunable(directory: Path) -> PreTrainedModel:
    """The checkpoint's model in float32 with :class:`TunableLinear` layers, and its 4-bit KV cache if it has one."""
    model = load_comet(directory, "none", kv4=True)
    comet = fmt.CometFormat.from_dict(AutoConfig.from_pretrained(directory).quantization_config)
    layers = read_tensors(directory)[1]
    for name, stored in (merge_stored(layers) if family_of(model.config).fused else layers).items():
        model.set_submodule(name, TunableLinear(stored, model.get_submodule(name).bias, comet.group_size))
    if comet.kv_cache is not None:
        model.set_attn_implementation(_straight_through_kv4(comet.kv_cache.group_size))
    return model


def save_tuned(model: PreTrainedModel, directory: Path) -> None:
    """Write what :func:`tune` changed back to the checkpoint's files."""
    dims = Dims.of(model.config)
    changed: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, TunableLinear):
            stored = {f"{name}.{suffix}": tensor for suffix, tensor in module.stored().items()}
            changed |= split_tensors(stored, dims) if family_of(model.config).fused else stored
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            changed[name] = parameter.detach().to("cpu", torch.bfloat16)
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        fmt.save_shard({name: changed.get(name, tensor) for name, tensor in tensors.items()}, path)


def _straight_through_kv4(group_size: int) -> str:
    """Register an attention over K and V as the 4-bit cache returns them, with gradients; returns its name."""
    name = f"comet_kv4_g{group_size}_straight_through"

    def forward(module, query, key, value, attention_mask, **kwargs):
        offset = getattr(module, fmt.K_OFFSET, None)
        key = key if offset is None else key - offset.unsqueeze(-2)
        key, value = (straight_through(x, round_trip_kv(x, group_size)) for x in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def tune(student: PreTrainedModel, teacher: PreTrainedModel, windows: torch.Tensor, options: TuneOptions) -> float:
    """Train the :class:`TunableLinear` layers, norms and biases of ``student`` in place; returns the last mean KL.

    windows: int64 ``[W, T]``. Both models are on the device to train on. Raises CalibrationError if the loss is not
    finite.
    """
    device = next(student.parameters()).device
    linears = [m for m in student.modules() if isinstance(m, TunableLinear)]
    optimizers = _optimizers(student, linears, options)
    batch = max(1, options.tokens // windows.shape[1])
    order = _epochs(len(windows), batch * options.steps, options.seed)
    student.train()
    if options.recompute:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    mean, mixed = math.nan, 0.0
    progress = trange(options.steps, desc="tuning", unit="step", dynamic_ncols=True)
    for step in progress:
        mixed += options.mixed_share
        for linear in linears:
            linear.low_bits = 4 if mixed >= 1 else 8
        mixed -= mixed >= 1
        ids = windows[order[step * batch : (step + 1) * batch]].to(device)
        rate = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["first_rate"] * rate
        with products_of_bf16():
            loss = _backward(student, teacher, ids)
        if not math.isfinite(loss):
            raise CalibrationError(f"--tune: the loss is {loss} at step {step}; lower the number of steps or check the "
                                   "model.")
        for linear in linears:
            if linear.codes.grad is not None:
                linear.codes.grad /= linear.codes.grad.square().mean().sqrt().clamp_min(1e-30)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss if step < 2 else 0.9 * mean + 0.1 * loss
        progress.set_postfix(kl=f"{mean:.4f}")
    if options.recompute:
        student.gradient_checkpointing_disable()
    student.eval()
    return mean


def _backward(student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean KL over the tokens of ``ids``; adds its gradient to the student's."""
    with torch.no_grad():
        target = teacher.model(ids, use_cache=False).last_hidden_state
    with torch.enable_grad():
        hidden = student.model(ids, use_cache=False).last_hidden_state
        loss, gradient = head_divergence(hidden, target, student.lm_head, teacher.lm_head)
        hidden.backward(gradient)
    return loss


def head_divergence(
    hidden: torch.Tensor, target: torch.Tensor, head: Callable, target_head: Callable
) -> tuple[float, torch.Tensor]:
    """Mean KL(target ‖ model) over tokens, and its gradient by ``hidden`` ``[B, T, D]``, some tokens at a time."""
    leaf = hidden.detach().flatten(0, -2).requires_grad_(True)
    total = 0.0
    for student, teacher in zip(leaf.split(_HEAD_TOKENS), target.flatten(0, -2).split(_HEAD_TOKENS), strict=True):
        with torch.no_grad():
            wanted = target_head(teacher).float().log_softmax(-1)
        with torch.enable_grad():
            loss = F.kl_div(head(student).float().log_softmax(-1), wanted, reduction="sum", log_target=True)
            (loss / len(leaf)).backward()
        total += loss.detach()
    assert leaf.grad is not None
    return float(total) / len(leaf), leaf.grad.view_as(hidden)


def _optimizers(
    student: PreTrainedModel, linears: list[TunableLinear], options: TuneOptions
) -> list[torch.optim.Optimizer]:
    """Adam for scales, norms and biases. Codes move in proportion to their gradient, in units of its root mean square
    in the layer, so that those change first that pay most; Adam's equal steps would change all of them at once."""
    student.requires_grad_(False)
    codes = [x.codes for x in linears] if options.code_rate else []
    norms = [p for name, p in student.named_parameters() if name.endswith("norm.weight")]
    groups = [([x.log_gain for x in linears], options.scale_rate),
              (norms + [x.bias for x in linears if x.bias is not None], options.norm_rate)]
    for parameter in codes + [p for parameters, _ in groups for p in parameters]:
        parameter.requires_grad_(True)
    adam = torch.optim.Adam([{"params": p, "lr": rate, "first_rate": rate} for p, rate in groups], betas=(0.9, 0.95))
    if not codes:
        return [adam]
    return [adam, torch.optim.SGD([{"params": codes, "lr": options.code_rate, "first_rate": options.code_rate}],
                                  momentum=0.9, dampening=0.9)]


def _epochs(count: int, wanted: int, seed: int) -> torch.Tensor:
    """Indices of ``wanted`` windows: all of them in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))])[:wanted]
