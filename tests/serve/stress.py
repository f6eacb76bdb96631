"""Random requests to a server with a tiny model: every answer must be its own `generate`, and nothing may be left over.

    python tests/serve/stress.py --requests 1000
    python tests/serve/stress.py --seconds 1200 --leave 0.5

Prompts of all lengths that begin alike or not, sampling, stop texts, several answers, streams, clients that leave, bad bodies.
"""

import argparse
import http.client
import json
import random
import re
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer

from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate

from serve.conftest import launch, serving  # isort: skip
from serve.reference import Reference  # isort: skip

CLIENTS = 12
CONTEXT = 512  # tokens
TEXTS = 500  # different ones; some are asked about again
BEGINNINGS = ("", "You are a llama. " * 3, "You are a llama. " * 3 + "You like grass. ", "Hello", "é" * 60)
BAD = (
    b"",
    b"{",
    b"[]",
    b'{"messages": 3}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "logit_bias": {"99999": 1}}',
    b'{"messages": [{"role": "user", "content": "' + b"x" * 600 + b'"}]}',
    b'{"messages": [{"role": "king", "content": "Hi"}]}',
    b"\xff\xfe",
)


def tiny_llm() -> LLM:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    return LLM(
        tiny_gpt(**VOCABULARY, block_size=CONTEXT), Preprocessor(tokenizer), ChatTemplate.from_tokenizer(tokenizer)
    )


def random_request(choose: random.Random) -> tuple[str, dict]:
    """A path and a body that ask for something."""
    path = choose.choice(("/v1/chat/completions", "/v1/chat/completions", "/v1/completions", "/predict"))
    texts = random.Random(choose.randrange(TEXTS))
    text = choose.choice(BEGINNINGS) + "".join(texts.choices("abc de\n", k=texts.choice((1, 3, 20, 200))))
    body: dict = {"temperature": 0} if choose.random() < 0.5 else {"temperature": 1.2, "top_p": 0.9, "top_k": 40}
    body["seed"] = choose.randrange(1000)
    body["max_new_tokens" if path == "/predict" else "max_tokens"] = choose.choice((1, 2, 10, 30, 80))
    if choose.random() < 0.3:
        body |= {"presence_penalty": 0.5, "frequency_penalty": 0.7}
    if choose.random() < 0.4:
        body["stop"] = choose.sample(["a", "b", "ab", "e", "\n", "Q", "4:"], 2)
    if path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": text}]
        if choose.random() < 0.4:
            begin = choose.choice(BEGINNINGS) or "Be kind."
            turn = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two."}]
            body["messages"] = [{"role": "system", "content": begin}, *turn, *body["messages"]]
    else:
        body["prompt"] = text
    if path != "/predict":
        body |= {"n": choose.choice((1, 1, 1, 2)), "stream": choose.random() < 0.5}
    return path, body


def texts_of(path: str, body: dict, data: bytes) -> list[str]:
    """The answers in what a server sent, which may be cut off in a stream."""
    if path == "/predict":
        return [json.loads(data)["output"]]
    if not body["stream"]:
        choices = json.loads(data)["choices"]
        return [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    texts = [""] * body["n"]
    for event in data.split(b"\n\n")[:-1]:
        if event != b"data: [DONE]":
            for choice in json.loads(event.removeprefix(b"data: "))["choices"]:
                texts[choice["index"]] += choice["delta"]["content"] if "delta" in choice else choice["text"]
    return texts


class Stress:
    """Requests of many clients at once, and what came of them."""

    def __init__(self, address: str, pid: int, llm: LLM, leave: float) -> None:
        self.host, self.pid, self.leave = address.removeprefix("http://"), pid, leave
        self.reference = Reference(llm, CONTEXT)
        self.problems: list[str] = []
        self.counts = {"answered": 0, "left": 0, "refused": 0}
        self.ties: list[
            float
        ] = []  # differences of logits between which rounding decided, of answers that are not the own

    def client(self, seed: int) -> None:
        choose = random.Random(seed)
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            if choose.random() < 0.1:
                self._bad(connection, choose)
            else:
                self._ask(connection, choose, *random_request(choose))
        except Exception as error:
            self.problems.append(f"request {seed}: {type(error).__name__}: {error}")
        finally:
            connection.close()

    def _bad(self, connection: http.client.HTTPConnection, choose: random.Random) -> None:
        connection.request("POST", "/v1/chat/completions", choose.choice(BAD))
        response = connection.getresponse()
        error = json.loads(response.read())["error"]
        if response.status != 400 or not error["message"]:
            raise AssertionError(f"a bad body had the status {response.status}: {error}")
        self.counts["refused"] += 1

    def _ask(self, connection: http.client.HTTPConnection, choose: random.Random, path: str, body: dict) -> None:
        leaves = choose.random() < self.leave
        connection.request("POST", path, json.dumps(body).encode())
        if leaves and (not body.get("stream") or choose.random() < 0.3):
            time.sleep(choose.random() * 0.05)
            self.counts["left"] += 1
            return
        response = connection.getresponse()
        data = response.read(choose.randrange(2000)) if leaves else response.read()
        if response.status != 200:
            raise AssertionError(f"status {response.status}: {data[:200]!r}")
        found = texts_of(path, body, data)
        gap = self.reference.gap(path, body, found, whole=not leaves)
        if gap is None:
            raise AssertionError(f"{path} {json.dumps(body)} gave {found}")
        if gap:
            self.ties.append(gap)
        self.counts["left" if leaves else "answered"] += 1

    def resources(self) -> dict[str, int]:
        """The server's resident memory in kB, threads and open files, once nothing runs."""
        until = time.monotonic() + 100
        while True:
            with urllib.request.urlopen(f"http://{self.host}/metrics", timeout=100) as response:
                text = response.read().decode()
            if "running 0\n" in text and "waiting 0\n" in text:
                break
            if time.monotonic() > until:
                raise AssertionError(f"rows are still in use:\n{text}")
            time.sleep(0.05)
        status = Path(f"/proc/{self.pid}/status").read_text()
        number = {name: int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
        return {**number, "files": len(list(Path(f"/proc/{self.pid}/fd").iterdir()))}

    def run(self, requests: int, seconds: float, first_seed: int = 0) -> None:
        """That many requests, or as many as are possible in that time, if it is longer."""
        end, seed = time.monotonic() + seconds, first_seed
        with ThreadPoolExecutor(CLIENTS) as pool:
            while seed - first_seed < requests or time.monotonic() < end:
                list(pool.map(self.client, range(seed, seed + CLIENTS * 2)))
                seed += CLIENTS * 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=0, help="go on until then")
    parser.add_argument("--leave", type=float, default=0.2, help="share of the clients that leave")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = tiny_llm()
        llm.save(Path(folder) / "tiny")
        options = ("--batch_size", 4, "--max_queue", 200, "--prefix_cache", 5, "--timeout", 600)
        with serving(Path(folder) / "tiny", *options, start=launch) as (address, process):
            stress = Stress(address, process.pid, llm, args.leave)
            started = time.monotonic()
            stress.run(min(args.requests, 300), args.seconds / 5)  # until memory for caches and kept states is taken
            print("at first", stress.resources(), flush=True)
            for part in range(4):
                stress.run(max(0, args.requests - 300) // 4, args.seconds / 5, 1000 + part * 10**6)
                print(
                    f"{time.monotonic() - started:.0f} s",
                    stress.resources(),
                    stress.counts,
                    f"{len(stress.problems)} wrong, ties: {stress.ties}",
                    flush=True,
                )
    print(*stress.problems[:20], sep="\n")
    return 1 if stress.problems else 0


if __name__ == "__main__":
    sys.exit(main())
