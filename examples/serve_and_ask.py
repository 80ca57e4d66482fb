# SPDX-License-Identifier: Apache-2.0
"""Serve a COMET checkpoint with ``vllm serve``, ask it one chat question over the OpenAI API, and compare with bf16.

    python examples/serve_and_ask.py CHECKPOINT "QUESTION"
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

from vllm_comet.checkpoint import verify_checkpoint

LOG = Path("out/serve.log")
KV_BYTES = 256 << 20
START_SECONDS = 600


@contextlib.contextmanager
def serve(model: str, *options: str) -> Iterator[tuple[str, str]]:
    """A running ``vllm serve``: its base URL and its log so far. Stopped on exit."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    LOG.parent.mkdir(exist_ok=True)
    command = ["vllm", "serve", model, "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048",
               "--kv-cache-memory-bytes", str(KV_BYTES), *options]
    with LOG.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Application startup complete" not in LOG.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"vllm serve did not start; the end of {LOG}:\n{LOG.read_text()[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", LOG.read_text()
    finally:
        server.terminate()
        server.wait(60)


def kv_tokens(log: str) -> int:
    """The number in vLLM's line "… KV cache size: N tokens"."""
    return int(re.findall(r"KV cache size: ([\d,]+) tokens", log)[-1].replace(",", ""))


def main() -> None:
    model, question = sys.argv[1:]
    with serve(model) as (url, log):
        client = OpenAI(base_url=url, api_key="none")
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=48)
        answer, comet_tokens = (reply.choices[0].message.content or "").strip(), kv_tokens(log)
    with serve(model, "--kv-cache-dtype", "bfloat16", "--enforce-eager") as (_, log):
        bf16_tokens = kv_tokens(log)
    size = verify_checkpoint(model)
    print(f"Q: {question}\nA: {answer}")
    print(f"checkpoint: {size.num_bytes / 1e6:.0f} MB, bf16 {size.bf16_bytes / 1e6:.0f} MB "
          f"({size.bf16_bytes / size.num_bytes:.2f}x smaller)")
    print(f"KV cache in {KV_BYTES >> 20} MiB (vLLM's log): {comet_tokens:,} tokens, bf16 {bf16_tokens:,} "
          f"({comet_tokens / bf16_tokens:.2f}x)")
    if not answer:
        sys.exit("The model gave no answer.")
    print(f"QUICKSTART OK: {answer!r}")


if __name__ == "__main__":
    main()
