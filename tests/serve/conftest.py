"""A real server process with a tiny model."""

import contextlib
import multiprocessing
import os
import secrets
import socket
import subprocess
import sys
import urllib.request

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer
from until import until

from litgpt.__main__ import main
from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate


def free_port() -> int:
    """None of those that the system gives to connections: it could be given away before the server listens."""
    while True:
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", 10_000 + secrets.randbelow(20_000)))
            return one.getsockname()[1]


def launch(arguments):
    """A process of `litgpt`, as users start it."""
    return subprocess.Popen([sys.executable, "-m", "litgpt", *arguments], env={**os.environ, "LITGPT_KERNELS": "0"})


class Forked:
    """A process of `litgpt` that begins where all is imported, with the methods of `subprocess.Popen`.

    Args:
        arguments: of the command.
        run: is called with them.
    """

    def __init__(self, arguments, run=main):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "litgpt.serve.base"])
        self._process = context.Process(target=_run, args=(run, arguments))
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode


def _run(run, arguments):
    os.environ["LITGPT_KERNELS"] = "0"
    sys.exit(run(arguments))


@contextlib.contextmanager
def serving(folder, *options, wait="/health", start=Forked):
    """The address of a server, and its process."""
    port = free_port()
    process = start(["serve", str(folder), "--port", str(port), "--precision", "32-true", *map(str, options)])
    address = f"http://127.0.0.1:{port}"

    def answers():
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(OSError):  # also of a status that is none of success
            return urllib.request.urlopen(address + wait, timeout=5)

    try:
        until(answers)
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
    with serving(checkpoint, "--batch_size", 3, "--max_queue", 200, start=launch) as (address, _):
        yield address


@pytest.fixture(scope="session")
def llm(checkpoint):
    return LLM.load(checkpoint, precision="32-true")
