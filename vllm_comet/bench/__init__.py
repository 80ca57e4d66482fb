# SPDX-License-Identifier: Apache-2.0
"""comet-bench: kernels measured against their peers in one run on one GPU."""
