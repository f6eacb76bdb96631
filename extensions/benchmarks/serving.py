"""Measures `litgpt serve` beside llama.cpp's server on the same GGUF file, and prints a table.

    python extensions/benchmarks/serving.py model-bf16.gguf --llama_server path/to/llama-server

Many clients with prompts of many lengths; the second turn of a long chat; a long prompt that joins while others are answered.
"""

import argparse
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

CHUNK = 256  # tokens of a prompt that are read between the next tokens of others
WORDS = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8").split()


class Server:
    """A server that answers as OpenAI's API does."""

    def __init__(self, command: list[str], threads: int) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while self._status() != 200:
            if self.process.poll() is not None:
                raise RuntimeError(f"{command[0]} has ended with {self.process.returncode}")
            time.sleep(0.1)

    def _status(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def stream(self, path: str, body: dict[str, Any]) -> tuple[list[float], int, str]:
        """Seconds after the request at which text came, the number of tokens, and the text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
        start, times, text, n = time.monotonic(), [], "", 0
        connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read()[:300]!r}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                n = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                if piece := choice["delta"].get("content") if "delta" in choice else choice["text"]:
                    times.append(time.monotonic() - start)
                    text += piece
        connection.close()
        return times, n, text

    def chat(self, messages: list[dict[str, str]], count: int) -> tuple[float, str]:
        """Seconds to the first text, and the answer."""
        times, _, text = self.stream("/v1/chat/completions", {"messages": messages, "max_tokens": count})
        return times[0], text


def prompt(seed: int, words: int) -> str:
    """Words of the licence from a place that depends on the seed."""
    at = random.Random(seed).randrange(len(WORDS) // 2)
    return f"{seed}. " + " ".join((WORDS[at:] + WORDS)[:words])


def many_clients(server: Server, clients: int, requests: int, count: int, seed: int) -> dict[str, float]:
    """New tokens a second of all clients together, and the median time to the first token."""
    sizes = [random.Random(seed + i).choice((15, 40, 90, 180, 350)) for i in range(requests)]

    def ask(i: int) -> tuple[float, int]:
        body = {"prompt": prompt(seed + i, sizes[i]), "max_tokens": count}
        times, n, _ = server.stream("/v1/completions", body)
        return times[0], n

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, range(requests)))
    seconds = time.monotonic() - start
    return {"tokens/s": sum(n for _, n in found) / seconds, "first token, s": median(first for first, _ in found)}


def second_turn(server: Server, words: int, seed: int) -> dict[str, float]:
    """Seconds to the first token of two turns of a chat about a long text."""
    messages = [{"role": "user", "content": prompt(seed, words)}]
    first, answer = server.chat(messages, 16)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Why?"}]
    return {"first turn, s": first, "second turn, s": server.chat(messages, 4)[0]}


def joining(server: Server, words: int, seed: int) -> dict[str, float]:
    """The longest time between two tokens of an answer that runs while a long prompt joins, and the time of one chunk alone."""
    chunk = server.stream("/v1/completions", {"prompt": prompt(seed + 2, int(CHUNK / 1.35)), "max_tokens": 2})[0][0]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(server.stream, "/v1/completions", {"prompt": prompt(seed, 20), "max_tokens": 200})
        time.sleep(0.5)
        long = pool.submit(server.stream, "/v1/completions", {"prompt": prompt(seed + 1, words), "max_tokens": 4})
        times, first = running.result()[0], long.result()[0][0]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return {"longest gap, s": max(gaps), f"{CHUNK} tokens alone, s": chunk, "long prompt, s": first}


@contextmanager
def serving(command: list[str], threads: int) -> Iterator[Server]:
    server = Server(command, threads)
    try:
        server.stream("/v1/completions", {"prompt": prompt(0, 300), "max_tokens": 8})  # warm up
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .gguf file, which both servers read")
    parser.add_argument("--llama_server", help="llama.cpp's llama-server (default: only ours)")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--words", type=int, default=1450, help="of a long prompt; a token has about 0.75 words")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows, context = str(args.clients), "1024"
    ours = [sys.executable, "-m", "litgpt", "serve", args.model, "--batch_size", rows, "--timeout", "300"]
    systems = {"litgpt": ours, "litgpt, no prefixes": [*ours, "--prefix_cache", "0"]}
    if args.llama_server:
        size = str(args.clients * int(context))
        llama = [
            args.llama_server,
            "-m",
            args.model,
            "-np",
            rows,
            "-c",
            size,
            "-t",
            str(args.threads),
            "-tb",
            str(args.threads),
        ]
        systems["llama.cpp"] = llama
        systems["llama.cpp, two rows"] = [*llama[:3], "-np", "2", "-c", "8192", *llama[7:]]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in systems}
    for round_idx in range(args.rounds):
        seed = 1000 * (round_idx + 1)
        for name, command in systems.items():
            with serving(command, args.threads) as server:
                result = {}
                if name in ("litgpt", "llama.cpp"):
                    result |= many_clients(server, args.clients, args.requests, args.tokens, seed)
                if name != "llama.cpp":  # whose rows are too short then
                    result |= second_turn(server, args.words, seed + 500)
                if name in ("litgpt", "llama.cpp, two rows"):
                    result |= joining(server, args.words, seed + 600)
            for figure, value in result.items():
                found[name].setdefault(figure, []).append(value)
    for name, figures in found.items():
        for figure, values in figures.items():
            print(f"| {name} | {figure} | {median(values):.3f} | {', '.join(f'{x:.3f}' for x in values)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
