"""A real server process with a tiny model."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serving(folder, *options, wait="/health", program=("-m", "litgpt")):
    """The address of a server, and its process."""
    port = free_port()
    command = [sys.executable, *program, "serve", str(folder), "--port", str(port), "--precision", "32-true"]
    environment = {**os.environ, "LITGPT_KERNELS": "0"}
    process = subprocess.Popen([*command, *map(str, options)], env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(address + wait, timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield address, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture(scope="session")
def tiny_llm():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = tiny_gpt(**VOCABULARY, block_size=512)
    return LLM(model, Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer))


@pytest.fixture(scope="session")
def checkpoint(tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny_llm.save(folder)
    return folder


@pytest.fixture(scope="session")
def server(checkpoint):
    with serving(checkpoint, "--batch_size", 3, "--max_queue", 200) as (address, _):
        yield address


@pytest.fixture(scope="session")
def llm(checkpoint):
    return LLM.load(checkpoint, precision="32-true")
