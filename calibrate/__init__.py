# SPDX-License-Identifier: Apache-2.0
"""Offline calibrator: a Hugging Face model in, a COMET checkpoint out. Never imported by the vLLM plugin."""
