# SPDX-License-Identifier: Apache-2.0
"""comet-eval: accuracy, text and cost of a base model and of candidates that replace it, as one report."""
