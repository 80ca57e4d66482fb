# SPDX-License-Identifier: Apache-2.0
"""The 4-bit KV cache inside vLLM: which layers use it (``select``) and the backend that serves them (``backend``)."""
