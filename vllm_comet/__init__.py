# SPDX-License-Identifier: Apache-2.0
"""vllm-comet: a vLLM plugin for 4-bit weights, mixed 4/8-bit activations and a 4-bit KV cache.

Importing this package imports nothing else. vLLM calls :func:`register` (entry point ``vllm.general_plugins``) in each
of its processes.
"""

__version__ = "0.1.0"

SUPPORTED_VLLM = ((0, 32), (0, 34))
"""vLLM versions the plugin was tested with: from the first, below the second."""

_registered = False


def register() -> None:
    """Make vLLM know the quantisation method ``comet`` and the attention backend ``COMET``; never raises.

    Safe to call often. On a vLLM outside :data:`SUPPORTED_VLLM` it logs one line and registers nothing, so that other
    models go on working.
    """
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.logger import init_logger

    logger = init_logger(f"vllm.{__name__}")  # vLLM configures the loggers below "vllm"
    reason = _unsupported_vllm()
    if reason:
        logger.warning("vllm-comet %s is inactive: %s", __version__, reason)
        return
    try:
        from vllm.v1.attention.backends.registry import register_backend

        import vllm_comet.quantization.config  # noqa: F401  (registers "comet")
        from vllm_comet.settings import register_environment

        register_environment()
        register_backend("COMET", "vllm_comet.attention.backend.CometAttentionBackend")
    except Exception:  # an exception here would stop every vLLM process, comet user or not
        logger.exception("vllm-comet %s is inactive: it could not register", __version__)


def _unsupported_vllm() -> str | None:
    import re

    from vllm import __version__ as found

    low, high = SUPPORTED_VLLM
    match = re.match(r"(\d+)\.(\d+)", found)
    if match and low <= (int(match[1]), int(match[2])) < high:
        return None
    return (f"it supports vLLM >= {low[0]}.{low[1]}, < {high[0]}.{high[1]}, this is {found}. "
            "COMET checkpoints can't be served; other models are not affected.")
