# SPDX-License-Identifier: Apache-2.0
"""What the calibrator knows about model families: names of linears, which share an input, norms, limits on TP.

All supported families are pre-norm decoders with rotary attention and a gated MLP; they differ only in the fields of
:class:`Family`. A family that needs more than a row of this table needs its own stages in ``decoder.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from calibrate.errors import CalibrationError
from vllm_comet.checkpoint import BLOCK


@dataclass(frozen=True)
class Family:
    """How a decoder family departs from Llama.

    qk_norm: RMSNorm on every head of q and k before RoPE. norm_offset: an RMSNorm multiplies by ``norm_offset +
    weight``. sandwich_norm: a second norm on the output of attention and of the MLP. scaled_embedding: embeddings
    are multiplied by ``sqrt(hidden_size)``. fused: q, k and v are one matrix on disk, and gate and up.
    """

    name: str
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich_norm: bool = False
    scaled_embedding: bool = False
    fused: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family("Llama"),
    "MistralForCausalLM": Family("Mistral"),
    "Qwen2ForCausalLM": Family("Qwen2"),
    "Qwen3ForCausalLM": Family("Qwen3", qk_norm=True),
    "Phi3ForCausalLM": Family("Phi3", fused=True),
    "Gemma3ForCausalLM": Family("Gemma3", qk_norm=True, norm_offset=1.0, sandwich_norm=True, scaled_embedding=True),
}


@dataclass(frozen=True)
class LinearInput:
    """One activation of a decoder layer and the linears that read it (one fused layer in vLLM)."""

    name: str
    members: tuple[str, ...]
    row_parallel: bool


QKV = LinearInput("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), False)
OUT = LinearInput("o", ("self_attn.o_proj",), True)
GATE_UP = LinearInput("gate_up", ("mlp.gate_proj", "mlp.up_proj"), False)
DOWN = LinearInput("down", ("mlp.down_proj",), True)
LINEAR_INPUTS = (QKV, OUT, GATE_UP, DOWN)


@dataclass(frozen=True)
class Dims:
    """Sizes of a decoder layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Dims:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.hidden_size, config.intermediate_size, config.num_attention_heads,
                   config.num_key_value_heads, head_dim, config.num_hidden_layers)

    def width(self, linear_input: LinearInput) -> int:
        """K: channels of that activation."""
        return {"qkv": self.hidden, "o": self.heads * self.head_dim, "gate_up": self.hidden,
                "down": self.intermediate}[linear_input.name]

    def rows(self, linear_input: LinearInput) -> tuple[int, ...]:
        """N: output channels of each of its members."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {"qkv": (queries, keys, keys), "o": (self.hidden,), "gate_up": (self.intermediate,) * 2,
                "down": (self.hidden,)}[linear_input.name]


def family_of(config: PretrainedConfig) -> Family:
    """The family of a Hugging Face config; raises CalibrationError naming the architecture and what is supported."""
    names = config.architectures or [type(config).__name__]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise CalibrationError(f"architecture {names[0]} is not supported; supported: {', '.join(FAMILIES)}.")


def layer_type(config: PretrainedConfig, index: int) -> str:
    """``full_attention`` or ``sliding_attention``."""
    types = getattr(config, "layer_types", None)
    if types:
        return types[index]
    return "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"


def rotates_whole_head(config: PretrainedConfig) -> bool:
    """Whether RoPE turns all channels of a head, not the first part of them (Phi-4-mini)."""
    return (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) == 1.0


def tensor_parallel_obstacle(dims: Dims, tp: int) -> str | None:
    if dims.heads % tp or dims.kv_heads % tp:
        return f"{dims.heads} query and {dims.kv_heads} KV heads don't divide by {tp}"
    for linear_input in LINEAR_INPUTS:
        width = dims.width(linear_input)
        if tp > 1 and linear_input.row_parallel and (width % tp or width // tp % BLOCK):
            return (f"{linear_input.members[0]} has K = {width} input channels; K / {tp} = {width / tp:g} is not a "
                    f"multiple of {BLOCK}")
    return None


def choose_tensor_parallel(dims: Dims, requested: int | None) -> int:
    """Largest of 8, 4, 2, 1 that the shapes allow, or ``requested``; raises CalibrationError when that one can't be."""
    allowed = [tp for tp in (8, 4, 2, 1) if tensor_parallel_obstacle(dims, tp) is None]
    if requested is None:
        return allowed[0]
    obstacle = tensor_parallel_obstacle(dims, requested)
    if obstacle:
        raise CalibrationError(f"--tensor-parallel {requested}: {obstacle}; allowed for this model: {allowed}.")
    return requested


def check_dims(dims: Dims) -> None:
    """Raise CalibrationError for a layer the format can't store."""
    for linear_input in LINEAR_INPUTS:
        if dims.width(linear_input) % 8:
            raise CalibrationError(f"{linear_input.members[0]} has K = {dims.width(linear_input)} input channels; the "
                                   "format needs a multiple of 8, so this model can't be stored.")
