# SPDX-License-Identifier: Apache-2.0
"""What is compared: a checkpoint and the mode it runs in, written ``[LABEL=]MODEL[@MODE]`` on the command line.

MODE is a list of words, joined by commas:

- for a COMET checkpoint ``auto`` (default; INT8 today), ``int8``, ``mixed`` or ``weights`` (4-bit weights, activations
  not quantised; simulation only), and ``kv16`` (KV cache in the model's dtype in place of 4 bits);
- for any checkpoint ``NAME=VALUE``, an engine argument of vLLM such as ``quantization=fp8`` (vLLM only).

``dummy:SHAPE:FORMAT`` is a model of random weights, for the cost alone: a shape and a format of ``comet-bench serve``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.errors import CalibrationError
from calibrate.evaluate.errors import EvaluationError
from calibrate.loading import open_model
from calibrate.simulate import Activations, load_base, load_comet
from vllm_comet.bench.serve_modes import MODELS, MODES, model_config, model_folder

ACTIVATIONS = ("auto", "int8", "mixed", "weights")
_HASHED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "*.safetensors")
_PROBES = ("The year 2024, it's 3.14 µm — naïve\n\tdef f(x): return x**2", "  two  spaces 12345 ÄÖÜ 你好 🙂")


@dataclass(frozen=True)
class Candidate:
    """``activations``: None unless the checkpoint is COMET's. ``options``: engine arguments for vLLM."""

    label: str
    directory: Path
    activations: str | None = None
    kv4: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        """The words after @, in full."""
        words = [] if self.activations is None else [self.activations]
        if self.activations is not None and not self.kv4:
            words.append("kv16")
        return ",".join([*words, *(f"{key}={json.dumps(value)}" for key, value in sorted(self.options.items()))])

    def describe(self, simulated: bool) -> str:
        """What runs, in words."""
        if self.activations is None:
            return "as stored" + (f", {self.mode}" if self.options else "")
        activations = {"weights": "W4, activations as stored", "mixed": "W4Ax (4 or 8 bits per block)"}
        kv = "4-bit KV cache" if self.kv4 else "KV cache as stored"
        how = "simulated in torch" if simulated else "served by vLLM"
        return f"{activations.get(self.activations, 'W4A8')}, {kv}, {how}"

    def torch_model(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model on ``device``; COMET checkpoints by the plain-torch references, i.e. simulated."""
        if self.activations is None:
            return load_base(self.directory, dtype).to(device)
        simulated: dict[str, Activations] = {"weights": "none", "mixed": "mixed"}
        return load_comet(self.directory, simulated.get(self.activations, "int8"), self.kv4, dtype).to(device)

    def check_backend(self, backend: str) -> None:
        """Raises EvaluationError if the backend can't honour the mode."""
        if backend == "torch" and self.options:
            raise EvaluationError(f"{self.label}: {', '.join(self.options)} is for vLLM; choose --backend vllm or "
                                  "--cost-only.")

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vLLM's engine; raises EvaluationError for a mode that cannot be served."""
        arguments: dict[str, Any] = {"model": str(self.directory)}
        if self.activations == "weights":
            raise EvaluationError(f"{self.label}: @weights is for simulation only; vLLM serves auto, int8 and mixed.")
        if self.activations is not None:
            arguments["additional_config"] = {"comet": {"activations": self.activations}}
            if not self.kv4 and _comet_config(self.directory)["kv_cache"]:
                arguments["kv_cache_dtype"] = "bfloat16"
        return arguments | self.options

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.directory)

    def size(self) -> int:
        """Bytes of the weights on disk."""
        return sum(file.stat().st_size for file in self.directory.glob("*.safetensors"))


def digest(directory: Path) -> str:
    """Hash over names and contents of a checkpoint's config, tokenizer and weights."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in _HASHED for path in directory.glob(pattern)}):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def parse_candidate(text: str, stack: contextlib.ExitStack) -> Candidate:
    """Read ``[LABEL=]MODEL[@MODE]``; ``stack`` keeps the temporary folder of a converted GGUF file."""
    label, model, mode = _split(text)
    if model.startswith("dummy:"):
        return _dummy(label, model, mode)
    try:
        directory = stack.enter_context(open_model(model)).directory if _has_weights(model) else Path(model)
    except CalibrationError as error:
        raise EvaluationError(str(error)) from None
    comet = _comet_config(directory)
    words = [word for word in mode.split(",") if word]
    options = dict(_option(word) for word in words if "=" in word)
    words = [word for word in words if "=" not in word]
    label = label or "-".join([Path(model).name, *words, *options]) or model
    if comet is None:
        if words:
            raise EvaluationError(f"{label}: {','.join(words)} is a mode of COMET checkpoints, which {model} is not.")
        return Candidate(label, directory, options=options)
    unknown = sorted(set(words) - {*ACTIVATIONS, "kv16"})
    activations = [word for word in words if word in ACTIVATIONS]
    if unknown or len(activations) > 1:
        raise EvaluationError(f"{label}: mode {mode!r}; allowed: one of {', '.join(ACTIVATIONS)}, and kv16.")
    kv4 = bool(comet.get("kv_cache")) and "kv16" not in words
    return Candidate(label, directory, (activations or ["auto"])[0], kv4, options)


def _split(text: str) -> tuple[str, str, str]:
    """Label, model and mode; a folder whose name has an @ or = in it is taken as it is."""
    if Path(text).exists():
        return "", text, ""
    head, _, mode = text.partition("@")
    label, _, model = head.rpartition("=")
    return label, model, mode


def _dummy(label: str, model: str, mode: str) -> Candidate:
    """A folder with the config alone."""
    _, _, rest = model.partition(":")
    shape, _, name = rest.partition(":")
    if shape not in MODELS or name not in MODES or mode:
        raise EvaluationError(f"{model}{'@' if mode else ''}{mode} is not dummy:SHAPE:FORMAT; shapes: "
                              f"{', '.join(MODELS)}; formats: {', '.join(MODES)}.")
    directory = model_folder(f"{shape}-{name}", MODES[name], model_config(shape))
    return Candidate(label or f"{shape}-{name}", directory, options={"load_format": "dummy", **MODES[name].engine})


def _has_weights(model: str) -> bool:
    """A folder with a config alone is enough for ``--cost-only`` with ``--engine load_format=dummy``."""
    path = Path(model)
    return not (path.is_dir() and (path / "config.json").exists() and not list(path.glob("*.safetensors")))


def _comet_config(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    quantization = config.get("quantization_config") or {}
    return quantization if quantization.get("quant_method") == "comet" else None


def _option(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def check_distinct(candidates: list[Candidate]) -> None:
    """Raises EvaluationError if two candidates carry the same label."""
    labels = [candidate.label for candidate in candidates]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise EvaluationError(f"Several models are called {', '.join(twice)}; give them names: LABEL=MODEL@MODE.")


def check_tokenizers(base: Candidate, candidates: list[Candidate]) -> PreTrainedTokenizerBase:
    """The tokenizer they share; raises EvaluationError naming the candidate whose tokens differ from the base's."""
    tokenizer = base.tokenizer()
    vocabulary = tokenizer.get_vocab()
    for candidate in candidates:
        other = candidate.tokenizer()
        found = other.get_vocab()
        if found != vocabulary:
            differ = sorted(token for token in {*found, *vocabulary} if found.get(token) != vocabulary.get(token))
            reason = f"{len(differ)} entries of the vocabulary differ, {differ[0]!r} first"
        elif any(tokenizer(text)["input_ids"] != other(text)["input_ids"] for text in _PROBES):
            reason = "the same text gives other tokens"
        else:
            continue
        raise EvaluationError(f"{candidate.label} has another tokenizer than {base.label}: {reason}. Scores of "
                              "different tokens can't be paired.")
    return tokenizer
