# SPDX-License-Identifier: Apache-2.0
"""vLLM parameters of a COMET linear layer. Tensor-parallel slicing is vLLM's own; added here are checks that name the
tensor, and a record of what was loaded, because vLLM leaves a tensor that the checkpoint lacks uninitialised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
    RowvLLMParameter,
)

from vllm_comet import checkpoint as ck


class InputChannelParameter(RowvLLMParameter):
    """A vector along K: sliced where the layer is row-parallel, otherwise one copy that all fused members share."""

    def _load_shared(self, loaded_weight: torch.Tensor) -> None:
        if getattr(self, "comet_loaded", None) and not torch.equal(self.data, loaded_weight.to(self.data.device)):
            raise ck.CheckpointError("its values differ between the layers that vLLM fuses (q, k, v or gate, up); they "
                                     "share one input and must be equal")
        self._assert_and_load(loaded_weight)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        self._load_shared(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._load_shared(loaded_weight)

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **kwargs: Any) -> None:
        self._load_shared(loaded_weight)


def create_parameters(
    layer: torch.nn.Module, prefix: str, n: int, k: int, group_size: int, weight_loader: Callable[..., None]
) -> None:
    """Register the comet tensors of one tensor-parallel rank's ``[n, k]`` part of a linear layer on ``layer``."""
    kinds: dict[str, tuple[type, dict[str, int]]] = {
        ck.WEIGHT_PACKED: (PackedvLLMParameter, {"input_dim": 1, "output_dim": 0, "packed_dim": 1, "packed_factor": 8}),
        ck.WEIGHT_SCALE: (ChannelQuantScaleParameter, {"output_dim": 0}),
        ck.WEIGHT_GROUP_SCALE: (GroupQuantScaleParameter, {"input_dim": 1, "output_dim": 0}),
        ck.INPUT_PERM: (InputChannelParameter, {"input_dim": 0}),
        ck.ACT_BITS_NAME: (InputChannelParameter, {"input_dim": 0}),
    }
    for name, (shape, dtype) in ck.linear_tensors(n, k, group_size).items():
        kind, dims = kinds[name]
        loader = _checked_loader(f"{prefix}.{name}", weight_loader)
        parameter = kind(data=torch.zeros(shape, dtype=dtype), weight_loader=loader, **dims)
        parameter.comet_loaded = set()
        layer.register_parameter(name, parameter)


def _checked_loader(name: str, weight_loader: Callable[..., None]) -> Callable[..., None]:
    def load(param: Any, loaded_weight: torch.Tensor, *shard_id: Any, **kwargs: Any) -> None:
        if loaded_weight.dtype != param.dtype:
            raise ck.CheckpointError(f"{name} is {loaded_weight.dtype}; the format says {param.dtype}.")
        try:
            weight_loader(param, loaded_weight, *shard_id, **kwargs)
        except (AssertionError, RuntimeError, ck.CheckpointError) as error:
            raise ck.CheckpointError(
                f"{name}: a tensor of shape {list(loaded_weight.shape)} does not fit the model's {list(param.shape)} "
                f"(part {shard_id or 'whole'}, tensor-parallel rank {param.tp_rank} of {param.tp_size}): "
                f"{error or 'the shapes differ'}. The checkpoint belongs to another model or is damaged."
            ) from error
        param.comet_loaded.add(shard_id[0] if shard_id else None)

    return load


def check_loaded(layer: torch.nn.Module, prefix: str, parts: int, optional: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError if a comet tensor of ``layer``, or one of its ``parts`` fused members, was never loaded."""
    for name in ck.COMET_SUFFIXES:
        parameter = getattr(layer, name, None)
        if parameter is None:
            continue
        loaded = parameter.comet_loaded
        complete = None in loaded or len(loaded) == parts
        if not complete and not (name in optional and not loaded):
            raise ck.CheckpointError(f"{prefix}.{name} is missing from the checkpoint: {len(loaded)} of {parts} fused "
                                     f"parts were loaded ({sorted(map(str, loaded))}).")
