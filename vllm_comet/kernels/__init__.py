# SPDX-License-Identifier: Apache-2.0
"""One file an operation, each with its Triton kernel, its launcher and its plain-torch reference (the definition)."""
