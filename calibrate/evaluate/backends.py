# SPDX-License-Identifier: Apache-2.0
"""Two ways to run a candidate for its answers: torch (a COMET checkpoint is simulated) and vLLM (what is served)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from calibrate.evaluate import environment
from calibrate.evaluate.candidates import Candidate
from calibrate.evaluate.likelihood import Likelihood, Request, TorchModel, encode_pairs

GENERATION_BATCH = 16


@dataclass(frozen=True)
class BackendOptions:
    """name: ``torch`` or ``vllm``. device, dtype: of the torch model. max_model_len: tokens, for vLLM.
    engine: further engine arguments of vLLM."""

    name: str
    device: str
    dtype: str
    max_model_len: int
    engine: dict[str, Any]

    def settings(self) -> dict[str, Any]:
        """What an answer depends on besides the checkpoint."""
        versions = environment.versions()
        if self.name == "torch":
            return {"backend": "torch", "device": self.device.partition(":")[0], "dtype": self.dtype,
                    "versions": {name: versions.get(name) for name in ("torch", "transformers", "vllm-comet")}}
        return {"backend": "vllm", "engine": self.engine, "versions": versions}


class Backend(Protocol):
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Log-likelihood of every pair's continuation given its context."""

    def score_tokens(self, requests: Sequence[Request]) -> list[Likelihood]:
        """The same for tokens."""

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Greedy continuation of every prompt, at most ``tokens`` long, without the end-of-text token."""


@contextlib.contextmanager
def open_backend(
    candidate: Candidate, tokenizer: PreTrainedTokenizerBase, options: BackendOptions
) -> Iterator[Backend]:
    """The candidate loaded and ready; vLLM's engine is gone afterwards."""
    if options.name == "torch":
        model = candidate.torch_model(torch.device(options.device), getattr(torch, options.dtype))
        yield TorchBackend(model, tokenizer)
        return
    backend = VllmBackend(candidate, tokenizer, options)
    try:
        yield backend
    finally:
        backend.close()


class TorchBackend(TorchModel):
    """TorchModel with greedy generation; prompts of similar length are decoded together, padded on the left."""

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        stop = _stop_tokens(self.model.generation_config, self.tokenizer)
        pad = stop[0] if stop else 0
        config = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=pad, eos_token_id=stop or None)
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        found: dict[int, list[int]] = {}
        for start in tqdm(range(0, len(order), GENERATION_BATCH), unit="batch", leave=False, disable=None):
            part = order[start:start + GENERATION_BATCH]
            width = len(prompts[part[0]])
            rows = [[pad] * (width - len(prompts[i])) + prompts[i] for i in part]
            mask = [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in part]
            out = self.model.generate(
                inputs=torch.tensor(rows, device=self.device), generation_config=config,
                attention_mask=torch.tensor(mask, device=self.device))
            found |= {i: _until(row, stop) for i, row in zip(part, out[:, width:].tolist(), strict=True)}
        return [found[i] for i in range(len(prompts))]


def _stop_tokens(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    stop = getattr(config, "eos_token_id", None)
    if stop is None:
        stop = tokenizer.eos_token_id
    return [] if stop is None else [stop] if isinstance(stop, int) else list(stop)


def _until(tokens: list[int], stop: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[:end]


class VllmBackend:
    """vLLM's offline engine; scores are its prompt log-probabilities (natural log)."""

    def __init__(self, candidate: Candidate, tokenizer: PreTrainedTokenizerBase, options: BackendOptions):
        from vllm import LLM

        arguments = {"max_model_len": options.max_model_len, "seed": 0, "disable_log_stats": True}
        arguments |= options.engine | candidate.engine_arguments()
        self.tokenizer, self.max_length = tokenizer, arguments["max_model_len"] - 2  # a pair and one generated token
        self.llm = LLM(**arguments)

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        return self.score_tokens(encode_pairs(self.tokenizer, pairs, self.max_length))

    def score_tokens(self, requests: Sequence[Request]) -> list[Likelihood]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run([[*request.context, *request.continuation] for request in requests], params)
        result = []
        for request, output in zip(requests, outputs, strict=True):
            entries = output.prompt_logprobs[len(request.context):]
            chosen = [entry[token] for entry, token in zip(entries, request.continuation, strict=True)]
            result.append(Likelihood(sum(one.logprob for one in chosen), all(one.rank == 1 for one in chosen)))
        return result

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> list[list[int]]:
        from vllm import SamplingParams

        stop = self.llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
        stop = [self.tokenizer.eos_token_id] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False)
        return [_until(list(output.outputs[0].token_ids), stop) for output in self._run(list(prompts), params)]

    def _run(self, prompts: list[list[int]], params: Any) -> list[Any]:
        return self.llm.generate([{"prompt_token_ids": tokens} for tokens in prompts], params)

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
