# SPDX-License-Identifier: Apache-2.0
"""An offset for K and smoothing of its outlier channels, so that 4 bits per (token, head) lose less.

What all keys of a head have in common, m, moves every score of a query by q·m, and softmax takes that out again: the
cache stores K − m, and nothing is added back (K smoothing of SageAttention, Zhang et al. 2025, with a constant m). In
models whose k_proj has a bias (Qwen2), m is up to 40 times as large as what tells keys apart. The channels that RoPE
turns slowly have most of it; those that turn within the context have little, so m is the mean over positions up to the
model's longest context (:func:`common_key`).

RoPE rotates channels i and i + D/2 of q and k into each other. Scaling such a pair of k by 1/λ_i and that of q by λ_i,
and turning both by one angle φ_i, commutes with RoPE and leaves every score as it was; the q heads of a KV group share
what their K head has. (λ alone is QServe's SmoothAttention, Lin et al. 2024.) Here λ and φ minimise the expected error
of the attention output: rounding moves each channel of key t by noise of variance step_t² / 12, hence its score by
step_t² / 12 · Σ_i (q_i λ_i)², hence the output, to first order, by the score's error times p_t (v_t − o):

    E‖Δo‖² ∝ Σ_t step_t(λ, φ)² · Σ_i a_ti λ_i²,    a_ti = Σ_queries p_t² ‖v_t − o‖² q_i²

with i over all channels of a group but its largest and its smallest, which set the step and are stored exactly. Unlike
the error measured on some keys, this does not depend on how those happen to round, so it fits other text too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from calibrate.decoder import DecoderLayer
from calibrate.models import rotates_whole_head

_QUERIES = 128
"""Queries of each sequence whose attention weighs the keys."""
_KEYS = 1024
"""Keys of each head, the most attended ones, on which λ is fitted."""
_STEPS, _RATE = 150, 0.05
_NEAR, _POSITIONS = 64, 4096
"""Positions of the offset's mean: how many, and below which distance they are not told apart."""


@dataclass(frozen=True)
class PairTransform:
    """log λ and φ of the channel pairs (i, i + D/2) of every KV head: float32 ``[kv_heads, D/2]`` each."""

    log_scale: torch.Tensor
    angle: torch.Tensor

    @staticmethod
    def both(pairs: torch.Tensor) -> torch.Tensor:
        """A value of each pair ``[..., D/2]`` for both of its channels ``[..., D]``."""
        return torch.cat([pairs, pairs], dim=-1)

    def turn(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """``x`` with its pairs along ``dim`` (size D) turned by φ; λ is left out. Heads come first in ``x``."""
        first, second = x.chunk(2, dim=dim)
        shape = [self.angle.shape[0]] + [1] * (x.dim() - 1)
        shape[dim] = self.angle.shape[1]
        cos, sin = self.angle.cos().view(shape), self.angle.sin().view(shape)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=dim)


def smooth_k(layer: DecoderLayer, x: torch.Tensor, kv_group_size: int) -> tuple[torch.Tensor, float]:
    """Fit λ and φ on inputs ``x`` ``[B, T, hidden]`` of the q and k projections, and fold them into ``layer``.

    Returns the offset of K after that, float32 ``[kv_heads, D]``, and the expected error of the attention output with
    it, λ and φ over the error without. Where q and k pass a norm, only its weights can take them up: λ is common to all
    heads and φ is zero. Where RoPE turns a part of the head only, there is the offset alone.
    """
    q, k, v = (t.to(torch.float32) for t in layer.qkv(x))
    offset = common_key(layer, k)
    keys, weight = _weighted_keys(layer, q, k, v)
    identity = PairTransform(*torch.zeros(2, len(offset), offset.shape[1] // 2, device=offset.device))
    plain = _expected_error(identity, keys, weight, kv_group_size).clamp_min(1e-30)
    keys -= offset.unsqueeze(1)
    if not rotates_whole_head(layer.builder.config):
        return offset, float((_expected_error(identity, keys, weight, kv_group_size) / plain).mean())
    transform, ratio = _fit(keys, weight, kv_group_size, plain, shared=layer.family.qk_norm)
    fold(layer, transform)
    return transform.turn(offset, dim=1) * (-transform.both(transform.log_scale)).exp(), ratio


def common_key(layer: DecoderLayer, k: torch.Tensor) -> torch.Tensor:
    """What keys have in common at any position up to the model's longest, float32 ``[kv_heads, D]``.

    k: ``[B, kv_heads, T, D]`` after RoPE. Its mean before RoPE, turned to positions of every order of magnitude: each
    doubling of the context counts the same, as short and long requests should both gain.
    """
    builder, length = layer.builder, layer.builder.config.max_position_embeddings
    cos, sin = _directions(layer, torch.arange(k.shape[2], device=k.device))
    mean = builder.apply_rotary(k, k, cos, -sin)[1].mean((0, 2))
    positions = torch.logspace(math.log2(_NEAR), math.log2(_NEAR + length), _POSITIONS, base=2, device=k.device)
    cos, sin = _directions(layer, (positions - _NEAR).long().clamp(0, length - 1))
    turned = mean[None, :, None].expand(-1, -1, _POSITIONS, -1)
    return builder.apply_rotary(turned, turned, cos, sin)[1].mean((0, 2))


def _directions(layer: DecoderLayer, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of RoPE ``[1, T, rotated channels]`` without the factor that some kinds of it scale them by."""
    cos, sin = layer.builder.rotary(positions.to(torch.float32), layer.index, positions)  # float32: as the first one
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length


def fold(layer: DecoderLayer, transform: PairTransform) -> None:
    """Apply ``transform`` to the weights that produce q and k, in place."""
    scale = transform.both(transform.log_scale).exp()
    if layer.family.qk_norm:
        offset = layer.family.norm_offset
        for norm, factor in ((layer.attn.q_norm, scale[0]), (layer.attn.k_norm, 1 / scale[0])):
            norm.weight.copy_((norm.weight + offset) * factor - offset)
        return
    group = layer.dims.heads // layer.dims.kv_heads
    for linear, factor, repeat in ((layer.attn.q_proj, scale, group), (layer.attn.k_proj, 1 / scale, 1)):
        per_head = PairTransform(*(t.repeat_interleave(repeat, 0) for t in (transform.log_scale, transform.angle)))
        factor = factor.repeat_interleave(repeat, 0)
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                rows = parameter.view(len(factor), layer.dims.head_dim, -1)  # [heads, D, K or 1]
                rows.copy_(per_head.turn(rows, dim=1) * factor.unsqueeze(-1))


def _weighted_keys(
    layer: DecoderLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most attended keys ``[kv_heads, n, D]`` and their a ``[kv_heads, n, D]``, scaled to a mean of 1 per head."""
    weights = torch.stack([_channel_weights(layer, *sample) for sample in zip(q, k, v, strict=True)], dim=1)
    weights, keys = weights.flatten(1, 2), k.transpose(0, 1).flatten(1, 2)
    best = weights.sum(-1).topk(min(_KEYS, keys.shape[1]), dim=1).indices.unsqueeze(-1).expand(-1, -1, k.shape[3])
    weights, keys = weights.gather(1, best), keys.gather(1, best)
    first, second = weights.chunk(2, dim=2)  # φ shifts importance inside a pair
    weights = ((first + second) / 2).repeat(1, 1, 2)
    return keys, weights / weights.mean().clamp_min(1e-30)


def _channel_weights(layer: DecoderLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """a of one sequence: q ``[heads, T, D]``, k and v ``[kv_heads, T, D]`` → ``[kv_heads, T, D]``."""
    length = k.shape[1]
    picked = torch.arange(length - 1, -1, -max(1, length // _QUERIES), device=q.device)
    distance = picked.unsqueeze(1) - torch.arange(length, device=q.device)
    hidden = distance < 0 if layer.window is None else (distance < 0) | (distance >= layer.window)
    q = q[:, picked].unflatten(0, (k.shape[0], -1))  # [kv_heads, group, Q, D]
    k, v = k.unsqueeze(1), v.unsqueeze(1)
    p = (q @ k.transpose(-1, -2) * layer.attn.scaling).masked_fill_(hidden, -torch.inf).softmax(-1)
    out = p @ v
    spread = out.square().sum(-1, keepdim=True) + v.square().sum(-1).unsqueeze(-2) - 2 * out @ v.transpose(-1, -2)
    return ((p.square() * spread.clamp_min(0)).transpose(-1, -2) @ q.square()).sum(1)


def _expected_error(
    transform: PairTransform, keys: torch.Tensor, weight: torch.Tensor, kv_group_size: int
) -> torch.Tensor:
    """Up to a constant, per KV head."""
    log_scale = transform.both(transform.log_scale).unsqueeze(1)
    groups = (transform.turn(keys, dim=2) * (-log_scale).exp()).unflatten(-1, (-1, kv_group_size))
    cost = (weight * (2 * log_scale).exp()).unflatten(-1, (-1, kv_group_size))
    step = groups.amax(-1) - groups.amin(-1)  # [kv_heads, n, G]
    return (step.square() * (cost.sum(-1) - _exact(groups, cost))).mean((1, 2))


def _exact(groups: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
    """``cost`` of each group's largest and smallest channel."""
    ends = torch.stack([groups.argmax(-1), groups.argmin(-1)], dim=-1)
    return cost.expand_as(groups).gather(-1, ends).sum(-1)


def _fit(
    keys: torch.Tensor, weight: torch.Tensor, kv_group_size: int, plain: torch.Tensor, shared: bool
) -> tuple[PairTransform, float]:
    """Gradient descent on log λ and φ; returns the best seen of each head and the mean of error over ``plain``.

    plain ``[kv_heads]``: the error without anything. ``shared``: one λ for all heads, and no φ.
    """
    heads, _, head_dim = keys.shape
    parameters = [torch.zeros(1 if shared else heads, head_dim // 2, device=keys.device) for _ in range(2)]
    best = [p.expand(heads, -1).clone() for p in parameters]
    lowest = _expected_error(PairTransform(*best), keys, weight, kv_group_size) / plain
    log_scale, angle = (p.requires_grad_(True) for p in parameters)
    optimizer = torch.optim.Adam([log_scale] if shared else [log_scale, angle], lr=_RATE)
    for _ in range(_STEPS):
        with torch.enable_grad():
            transform = PairTransform(log_scale.expand(heads, -1), angle.expand(heads, -1))
            ratio = _expected_error(transform, keys, weight, kv_group_size) / plain
            ratio.sum().backward()
        found = ratio.detach().mean().expand(heads) if shared else ratio.detach()
        better = (found < lowest).unsqueeze(1)
        lowest = torch.minimum(found, lowest)
        best = [torch.where(better, p.detach(), b) for p, b in zip((log_scale, angle), best, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
    return PairTransform(*best), float(lowest.mean())
