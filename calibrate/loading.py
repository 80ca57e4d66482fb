# SPDX-License-Identifier: Apache-2.0
"""Where a model's tensors come from: a Hugging Face folder, a hub id, or a GGUF file converted to such a folder."""

from __future__ import annotations

import contextlib
import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.errors import CalibrationError
from calibrate.models import family_of

_INDEX = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_DIGIT_SPLITTING = ("smollm",)
"""``tokenizer.ggml.pre`` values whose pre-tokenizer splits digits; transformers' GGUF reader drops that step."""
_WORDS = 100
"""Words of a GGUF file's vocabulary that its tokenizer is tried on."""


class ModelSource:
    """A local Hugging Face folder of safetensors, read tensor by tensor."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._files = self._locate(directory)

    @staticmethod
    def _locate(directory: Path) -> dict[str, Path]:
        index = directory / _INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                return {name: directory / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CalibrationError(f"{index} is no index of tensors: {error!r}") from None
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise CalibrationError(f"{directory} holds no .safetensors file; save the model with save_pretrained().")
        located: dict[str, Path] = {}
        for file in files:
            with open_shard(file) as handle:
                located.update(dict.fromkeys(handle.keys(), file))
        return located

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def config(self) -> PretrainedConfig:
        try:
            config = AutoConfig.from_pretrained(self.directory)
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"{self.directory / 'config.json'} can't be used: {_first_line(error)}") from None
        if getattr(config, "quantization_config", None):
            raise CalibrationError(f"{self.directory} is quantised already; start from the model's original weights.")
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory)
        except (OSError, ValueError, KeyError) as error:
            raise CalibrationError(f"{self.directory} has no usable tokenizer: {_first_line(error)}") from None
        if not tokenizer("a")["input_ids"]:  # what transformers makes of a folder without tokenizer files
            raise CalibrationError(f"{self.directory} has no usable tokenizer: it finds no token in a text.")
        return tokenizer

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the precision of the file; raises CalibrationError if it is missing or not finite."""
        with self._open(name) as handle:
            tensor = handle.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise CalibrationError(f"{name} in {self._files[name].name} holds NaN or infinite values.")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header of its file."""
        with self._open(name) as handle:
            return tuple(handle.get_slice(name).get_shape())

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[safe_open]:
        if name not in self._files:
            raise CalibrationError(f"{self.directory} lacks the tensor {name}.")
        with open_shard(self._files[name]) as handle:
            yield handle

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        with self._open(name) as handle:
            part = handle.get_slice(name)
            return math.prod(part.get_shape()) * int(re.sub(r"\D", "", part.get_dtype())) // 8

    def is_tied_head(self, name: str) -> bool:
        """Whether ``name`` is an output matrix that repeats the embedding."""
        return name == "lm_head.weight" and bool(self.config().tie_word_embeddings)

    def bf16_bytes(self) -> int:
        """Bytes of the whole model in bf16."""
        return sum(2 * math.prod(self.shape(name)) for name in self.names if not self.is_tied_head(name))

    def module_tensors(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors below ``prefix.``, names relative to it."""
        start = len(prefix) + 1
        return {name[start:]: self.tensor(name) for name in self.names if name.startswith(prefix + ".")}


@contextlib.contextmanager
def open_shard(path: Path) -> Iterator[safe_open]:
    """A safetensors file; raises CalibrationError naming it if it is missing, truncated or no such file."""
    try:
        with safe_open(path, "pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} can't be read: {error}. Download or copy it again.") from None


@contextlib.contextmanager
def open_model(model: str) -> Iterator[ModelSource]:
    """Open ``model``: a folder, a ``.gguf`` file (converted to a temporary folder), or a hub id (downloaded)."""
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise CalibrationError(f"{path} holds no config.json: it is not a Hugging Face model folder.")
        yield ModelSource(path)
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise CalibrationError(f"{path} does not exist.")
        with tempfile.TemporaryDirectory(prefix="comet-gguf-") as folder:
            convert_gguf(path, Path(folder))
            yield ModelSource(Path(folder))
    else:
        yield ModelSource(_download(model))


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise CalibrationError(f"{model} is neither a folder, nor a .gguf file, nor a hub id.") from None
    except OSError as error:
        raise CalibrationError(f"{model} is no local folder or .gguf file, and the hub could not give it: "
                               f"{_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def convert_gguf(path: Path, directory: Path) -> None:
    """Dequantise a GGUF file into a bf16 Hugging Face folder with its tokenizer. Holds the whole model in memory."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = gguf.GGUFReader(path)
        pre, adds_bos = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("pre", "add_bos_token"))
    except (ValueError, IndexError) as error:
        raise CalibrationError(f"{path} is not a readable GGUF file: {error}") from None
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    family_of(config)
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)
    save_file({name: t.contiguous() for name, t in tensors["tensors"].items()}, directory / "model.safetensors",
              metadata={"format": "pt"})
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    _save_generation_config(model, directory)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)
    if pre is not None and pre.contents() in _DIGIT_SPLITTING:
        _split_digits(directory / "tokenizer.json")
    if adds_bos is not None and adds_bos.contents():
        _begin_with_bos(directory)
    _check_words(AutoTokenizer.from_pretrained(directory), path)


def _check_words(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Raise CalibrationError for a tokenizer that splits its own words, as transformers 5.17 reads Gemma's."""
    words = [(token[1:], i) for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
             if re.fullmatch("[▁Ġ][A-Za-z]{5,}", token)][:_WORDS]
    encoded = tokenizer([f"a {word}" for word, _ in words], add_special_tokens=False)["input_ids"] if words else []
    split = [word for (word, i), ids in zip(words, encoded, strict=True) if i not in ids]
    if 2 * len(split) > len(words):
        raise CalibrationError(
            f"transformers {transformers.__version__} misreads the tokenizer of {path}: it splits {len(split)} of "
            f"{len(words)} words that are tokens, such as {split[0]!r}. Use a newer transformers, or a Hugging Face "
            "folder.")


def _save_generation_config(model: torch.nn.Module, directory: Path) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(directory)


def _begin_with_bos(directory: Path) -> None:
    """Put BOS before every text, as the GGUF file asks; transformers' reader drops that step."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        return
    path, bos = directory / "tokenizer.json", tokenizer.bos_token
    raw = json.loads(path.read_text())
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing", "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}}}
    path.write_text(json.dumps(raw, ensure_ascii=False))


def _split_digits(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    path.write_text(json.dumps(tokenizer, ensure_ascii=False))
