# SPDX-License-Identifier: Apache-2.0
"""vllm-comet: a vLLM plugin for 4-bit weights, mixed 4/8-bit activations and a 4-bit KV cache."""

__version__ = "0.1.0"
