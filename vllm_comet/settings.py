# SPDX-License-Identifier: Apache-2.0
"""User settings: environment variables, and ``--additional-config '{"comet": {…}}'``, which comes first.

==========================================  ========  ================================================================
setting                                     default   values
==========================================  ========  ================================================================
``comet.activations``,                      auto      ``int8``: every block in INT8 (W4A8). ``mixed``: 4 or 8 bits per
``VLLM_COMET_ACTIVATIONS``                            block, as calibrated (W4Ax). ``auto``: what is faster on this
                                                      device and, where they tie, as everywhere today, ``int8``.
``VLLM_COMET_VERIFY``                       1         check the checksums of a local checkpoint before loading it: 0, 1
==========================================  ========  ================================================================
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("auto", "mixed", "int8")
DEFAULTS = {"VLLM_COMET_ACTIVATIONS": "auto", "VLLM_COMET_VERIFY": "1"}


def register_environment() -> None:
    """Make our variables known to vLLM: it warns of others, and its cache of compiled graphs is keyed by known ones."""
    from vllm import envs

    for variable, default in DEFAULTS.items():
        envs.environment_variables[variable] = functools.partial(os.environ.get, variable, default)


@dataclass(frozen=True)
class Settings:
    activations: str = "auto"
    verify: bool = True

    @classmethod
    def load(cls, additional_config: Mapping[str, Any] | None = None) -> Settings:
        """Read the settings; raises ValueError naming the setting, where it was given, its value and allowed ones."""
        given = (additional_config or {}).get("comet", {})
        where = "--additional-config comet"
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {given!r}; it must be an object with the key activations.")
        unknown = sorted(set(given) - {"activations"})
        if unknown:
            raise ValueError(f"{where} has unknown keys {unknown}; allowed: activations.")
        modes = {mode: mode for mode in ACTIVATIONS}
        if "activations" in given:
            activations = _allowed(f"{where}.activations", str(given["activations"]), modes)
        else:
            activations = _environment("VLLM_COMET_ACTIVATIONS", modes)
        return cls(activations, _environment("VLLM_COMET_VERIFY", {"0": False, "1": True}))


def _environment(variable: str, allowed: dict[str, Any]) -> Any:
    return _allowed(variable, os.environ.get(variable, DEFAULTS[variable]), allowed)


def _allowed(where: str, value: str, allowed: dict[str, Any]) -> Any:
    if value.lower() not in allowed:
        raise ValueError(f"{where} is {value!r}; allowed: {', '.join(allowed)}.")
    return allowed[value.lower()]
