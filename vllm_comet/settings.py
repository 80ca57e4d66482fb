# SPDX-License-Identifier: Apache-2.0
"""User settings: ``--additional-config '{"comet": {…}}'`` first, then ``VLLM_COMET_*`` environment variables.

=============  =========================  ========  ==================================================================
setting        environment variable       default   values
=============  =========================  ========  ==================================================================
activations    VLLM_COMET_ACTIVATIONS     auto      ``int8``: every block in INT8 (W4A8). ``mixed``: 4 or 8 bits per
                                                    block, as calibrated (W4Ax). ``auto``: the faster of the two on
                                                    this device, and the more accurate where they tie.
verify         VLLM_COMET_VERIFY          1         check the checksums of a local checkpoint before loading it (0, 1)
=============  =========================  ========  ==================================================================
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
        where = '--additional-config "comet"'
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} is {given!r}; it must be an object with the keys activations and verify.")
        unknown = sorted(set(given) - {"activations", "verify"})
        if unknown:
            raise ValueError(f"{where} has unknown keys {unknown}; allowed: activations, verify.")
        activations = _choose(given, "activations", "VLLM_COMET_ACTIVATIONS", {a: a for a in ACTIVATIONS})
        switch = {"0": False, "1": True, "false": False, "true": True}
        verify = _choose(given, "verify", "VLLM_COMET_VERIFY", switch)
        return cls(activations, verify)


def _choose(given: Mapping[str, Any], key: str, variable: str, allowed: dict[str, Any]) -> Any:
    if key in given:
        value, where = str(given[key]).lower(), f"--additional-config comet.{key}"
    else:
        value, where = os.environ.get(variable, DEFAULTS[variable]).lower(), variable
    if value not in allowed:
        raise ValueError(f"{where} is {value!r}; allowed: {', '.join(allowed)}.")
    return allowed[value]
