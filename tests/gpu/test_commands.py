"""Commands as processes that find the device themselves."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import CHAT_TEMPLATE, VOCABULARY, tiny_gpt, tiny_tokenizer
from until import until

from litgpt.api import LLM, Preprocessor
from litgpt.prompts import ChatTemplate

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tiny model."""
    folder = tmp_path_factory.mktemp("gpu") / "tiny"
    torch.manual_seed(0)
    model = tiny_gpt(**VOCABULARY, block_size=512, n_layer=3)
    LLM(model, Preprocessor(tiny_tokenizer()), ChatTemplate(CHAT_TEMPLATE)).save(folder)
    return str(folder)


def start(device, *arguments, **how):
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "litgpt", *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **hidden}, **pipes, **how)


def run(device, *arguments, stdin=None):
    process = start(device, *arguments)
    out, err = process.communicate(stdin, timeout=200)
    assert process.returncode == 0, err
    return out, err


CPU, GREEDY = torch.device("cpu"), ("--temperature", "0", "--max_new_tokens", "20", "--precision", "32-true")


@pytest.mark.parametrize(
    "options", [(), ("--kv_cache", "h2o", "--cache_length", "32"), ("--num_samples", "3")], ids=lambda x: "-".join(x)
)
def test_generate(options, folder, device):
    arguments = ("generate", folder, "--prompt", "Hello", *GREEDY, *options)
    out, err = run(device, *arguments)
    assert "20 tokens" in err or "tokens in" in err
    assert out == run(CPU, *arguments)[0]


def test_generate_with_what_the_device_does_best(folder, device):
    for options in ((), ("--quantize", "int8"), ("--kv_cache", "dense-int4")):
        out, _ = run(
            device, "generate", folder, "--prompt", "Hello", "--max_new_tokens", 20, "--temperature", 0, *options
        )
        assert out.endswith("\n")


def test_generate_compiled(folder, device):
    arguments = ("generate", folder, "--prompt", "Hello", *GREEDY)
    assert run(device, *arguments, "--compile", "true")[0] == run(CPU, *arguments)[0]


def test_chat(folder, device, tmp_path):
    arguments = ("chat", folder, *GREEDY)
    expected = run(CPU, *arguments, stdin="Hello\nAnd then?\n/exit\n")[0]
    assert run(device, *arguments, stdin="Hello\nAnd then?\n/exit\n")[0] == expected
    run(device, *arguments, "--session", tmp_path / "talk", stdin="Hello\n/exit\n")
    run(device, *arguments, "--session", tmp_path / "talk", stdin="And then?\n/exit\n")


def test_finetune_and_what_it_writes(folder, device, tmp_path):
    samples = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "red", "blue")]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    text = f"""--data JSON --data.json_path {tmp_path}/samples.json --data.val_split_fraction 0.25 --train.max_steps 3
        --train.global_batch_size 2 --train.micro_batch_size 1 --train.lr_warmup_steps 1 --eval.max_new_tokens 2"""
    out, _ = run(device, "finetune_lora", folder, "--out_dir", tmp_path / "out", *text.split())
    assert out.count("(step)") == 3
    final = tmp_path / "out" / "final"
    run(device, "generate", final, "--prompt", "Say one.", *GREEDY)
    arguments = ("--kv_cache", "h2o", "--cache_length", "32", "--prompt_chunksize", "16")
    out, _ = run(device, "finetune_lora", folder, "--out_dir", tmp_path / "through", *text.split(), *arguments)
    assert out.count("(step)") == 3


def test_plan_cache(folder, device):
    out, _ = run(device, "plan_cache", folder)
    assert "tokens" in out


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def ask(address, text, tokens=12):
    body = {"model": "tiny", "temperature": 0, "max_tokens": tokens, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=100) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


@pytest.mark.parametrize("options", [(), ("--kv_cache", "lastrec", "--cache_length", "64")], ids=lambda x: "-".join(x))
def test_serve_answers_many_at_a_time(options, folder, device):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    process = start(device, "serve", folder, "--port", port, "--precision", "32-true", *options)

    def answers():
        assert process.poll() is None, process.stderr.read()
        try:
            return urllib.request.urlopen(f"{address}/health", timeout=5)
        except OSError:
            return None

    try:
        until(answers)
        texts = ["Hello", "What is this?", "x", "A longer question, with more words in it."]
        alone = [ask(address, text) for text in texts]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda text: ask(address, text), texts * 2)) == alone * 2
    finally:
        process.terminate()
        process.communicate(timeout=60)
