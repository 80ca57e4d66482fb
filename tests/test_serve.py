# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` over HTTP: 20 requests at once, streamed, each equal to the same request alone."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny

pytestmark = pytest.mark.e2e
START_SECONDS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = tiny.write(folder / "model")
    tiny.write_tokenizer(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
               "--quantization", "comet", "--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512",
               "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20), "--served-model-name", "tiny",
               "--dtype", "float32"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT,
                                   env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    try:
        deadline = time.monotonic() + START_SECONDS
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def post(url, body):
    data = json.dumps({"model": "tiny", "temperature": 0, "max_tokens": 24, "ignore_eos": True} | body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def stream(base, prompt):
    """The pieces of a streamed completion."""
    with post(f"{base}/v1/completions", {"prompt": prompt, "stream": True}) as reply:
        lines = [line.decode()[6:].strip() for line in reply if line.startswith(b"data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]


def test_twenty_concurrent_streams(server):
    base = server
    prompts = ["x" * (1 + 11 * i) for i in range(20)]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda prompt: stream(base, prompt), prompts))
    assert all(len(pieces) > 1 for pieces in together)
    for i in (0, 7, 19):
        with post(f"{base}/v1/completions", {"prompt": prompts[i]}) as reply:
            alone = json.load(reply)["choices"][0]
        assert "".join(together[i]) == alone["text"] and alone["finish_reason"] == "length"


def test_chat_with_logprobs_and_several_samples(server):
    base = server
    body = {"messages": [{"role": "user", "content": "hello"}], "n": 3, "temperature": 1.0, "seed": 1, "logprobs": True}
    with post(f"{base}/v1/chat/completions", body) as reply:
        choices = json.load(reply)["choices"]
    assert len(choices) == 3 and all(len(c["logprobs"]["content"]) == 24 for c in choices)
