# SPDX-License-Identifier: Apache-2.0
"""Smoothing of outlier channels in K, so that 4 bits per (token, head) lose less.

Channel i of k is divided by a factor λ_i and channel i of q multiplied by it, which leaves every score as it was. RoPE
rotates channels i and i + D/2 into each other, so both have the same factor; the q heads of a KV group share their
K head's. The idea is QServe's SmoothAttention (Lin et al. 2024); here the factor also counts how much of a channel's
error q lets through, and its two exponents are searched by the error of the attention output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from calibrate.decoder import DecoderLayer, round_trip_kv

_SAMPLES, _QUERIES = 2, 64
"""Sequences, and queries of each, on which a factor is judged."""
_K_EXPONENTS = tuple(i / 10 for i in range(11))
_Q_EXPONENTS = (0.0, 0.25, 0.5)
_REFINE = (2.0**-0.5, 2.0**0.5)


def smooth_k(layer: DecoderLayer, x: torch.Tensor, kv_group_size: int) -> float:
    """Search λ on inputs ``x`` ``[B, T, hidden]`` of the q and k projections, and fold it into ``layer``.

    Returns the error of the attention output with it over the error without.
    """
    q, k, v = (t.to(torch.float32) for t in layer.qkv(x[:_SAMPLES]))
    error = _error_function(layer, q, k, v, kv_group_size)
    shared = layer.family.qk_norm  # the norms' weights are common to all heads
    plain = torch.ones(k.shape[1], k.shape[3] // 2, device=k.device)
    factor = _refine(_search(q, k, error, shared), error, shared)
    ratio = float(error(factor).sum() / error(plain).sum().clamp_min(1e-30))
    if ratio < 1:
        fold_factor(layer, torch.cat([factor, factor], dim=1))
    return min(ratio, 1.0)


def fold_factor(layer: DecoderLayer, factor: torch.Tensor) -> None:
    """Divide k and multiply q by ``factor`` ``[kv_heads, head_dim]`` in the weights that produce them, in place."""
    if layer.family.qk_norm:
        offset = layer.family.norm_offset
        for norm, scale in ((layer.attn.q_norm, factor[0]), (layer.attn.k_norm, 1 / factor[0])):
            norm.weight.copy_((norm.weight + offset) * scale - offset)
        return
    per_query_head = factor.repeat_interleave(layer.dims.heads // layer.dims.kv_heads, dim=0).flatten()
    for linear, scale in ((layer.attn.q_proj, per_query_head), (layer.attn.k_proj, 1 / factor.flatten())):
        linear.weight.mul_(scale.unsqueeze(1))
        if linear.bias is not None:
            linear.bias.mul_(scale)


def _error_function(
    layer: DecoderLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_group_size: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Squared error ``[kv_heads]`` of the attention output, as a function of a factor ``[kv_heads, D/2]``."""
    length, heads, kv_heads = q.shape[2], q.shape[1], k.shape[1]
    picked = torch.arange(length - 1, -1, -max(1, length // _QUERIES), device=q.device)
    q = q[:, :, picked].unflatten(1, (kv_heads, heads // kv_heads))
    distance = picked.unsqueeze(1) - torch.arange(length, device=q.device)
    hidden = (distance < 0) if layer.window is None else (distance < 0) | (distance >= layer.window)

    def attend(keys: torch.Tensor) -> torch.Tensor:
        scores = q @ keys.unsqueeze(2).transpose(-1, -2) * layer.attn.scaling
        return scores.masked_fill_(hidden, -torch.inf).softmax(-1) @ v.unsqueeze(2)

    exact = attend(k)

    def error(factor: torch.Tensor) -> torch.Tensor:
        scale = torch.cat([factor, factor], dim=1).unsqueeze(1)
        return (attend(round_trip_kv(k / scale, kv_group_size) * scale) - exact).square().sum((0, 2, 3, 4))

    return error


def _pairs(x: torch.Tensor) -> torch.Tensor:
    """Largest of channels i and i + D/2: ``[..., D]`` → ``[..., D/2]``."""
    return torch.maximum(*x.chunk(2, dim=-1))


def _search(
    q: torch.Tensor, k: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor], shared: bool
) -> torch.Tensor:
    """Best ``λ = max|k|^a / rms(q)^b`` of a grid of exponents, for each KV head (or one for all)."""
    peak = _pairs(k.abs().amax((0, 2))).clamp_min(1e-6)
    power = q.square().mean((0, 2)).unflatten(0, (k.shape[1], -1)).mean(1)
    rms = _pairs(power.sqrt()).clamp_min(1e-6)
    if shared:
        peak, rms = (t.amax(0, keepdim=True).expand_as(t) for t in (peak, rms))
    best = torch.ones_like(peak)
    lowest = error(best)
    for a, b in itertools.product(_K_EXPONENTS, _Q_EXPONENTS):
        factor = peak**a / rms**b
        best, lowest = _keep_better(best, lowest, factor / factor.mean(1, keepdim=True), error, shared)
    return best


def _refine(factor: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor], shared: bool) -> torch.Tensor:
    """One pass of coordinate descent: each pair of channels in turn a little up or down, all heads at once."""
    lowest = error(factor)
    for pair, step in itertools.product(range(factor.shape[1]), _REFINE):
        trial = factor.clone()
        trial[:, pair] *= step
        factor, lowest = _keep_better(factor, lowest, trial, error, shared)
    return factor


def _keep_better(
    best: torch.Tensor, lowest: torch.Tensor, trial: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor],
    shared: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    found = error(trial)
    better = (found.sum() < lowest.sum()).expand_as(found) if shared else found < lowest
    return torch.where(better.unsqueeze(1), trial, best), torch.where(better, found, lowest)
