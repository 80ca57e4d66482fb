# SPDX-License-Identifier: Apache-2.0
"""The quantisation method ``comet``: config, linear layers and their parameters, on vLLM's own extension points."""
