"""The engine's thread: what it delivers, and when."""

import threading

import pytest
import torch
from tiny import VOCABULARY, tiny_gpt, tiny_tokenizer
from until import LIMIT, until

from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.sampling import Sampling
from litgpt.engine.service import Generation, Service

CHUNK = 16


@pytest.fixture
def service():
    torch.manual_seed(0)
    model = tiny_gpt(**VOCABULARY, block_size=512)
    batch = ContinuousBatch(model, 3, prompt_chunksize=CHUNK, prefixes=PrefixStore(1_000_000))
    one = Service({"tiny": (batch, tiny_tokenizer())})
    one.start()
    yield one
    one.close()


class Client:
    """Collects what is delivered."""

    def __init__(self, length, count, at_piece=lambda n: None, **settings):
        self.pieces, self.done, self.at_piece = [], threading.Event(), at_piece
        prompt = torch.arange(length) % 200 + 30
        self.generation = Generation("tiny", prompt, count, Sampling(temperature=0, **settings), deliver=self.deliver)

    def deliver(self, generation, text):
        if text:
            self.pieces.append(text)
            self.at_piece(len(self.pieces))
        if generation.finish_reason:
            self.done.set()

    def wait(self):
        assert self.done.wait(LIMIT)
        return self.generation


def test_between_the_others_next_tokens_a_long_prompt_is_read_chunk_by_chunk(service):
    chunks = 7
    long, tokens = (
        Client(chunks * CHUNK, 2),
        [],
    )  # that the other had when the long prompt joined, and at its first token

    def join(n):
        if n == 5:
            service.submit(long.generation)
            tokens.append(short.generation.sequence.n_new)

    short = Client(3, 60, join)
    long.at_piece = lambda n: tokens.append(short.generation.sequence.n_new) if n == 1 else None
    service.submit(short.generation)
    long.wait(), short.wait()
    assert tokens[1] - tokens[0] in (chunks, chunks + 1, chunks + 2)  # as its first token may be part of a character
    alone = Client(3, 60)
    service.submit(alone.generation)
    alone.wait()
    assert alone.pieces == short.pieces


def test_an_answer_that_is_cut_keeps_what_it_has(service):
    client = Client(3, 400, lambda n: service.cut(client.generation) if n == 5 else None)
    service.submit(client.generation)
    assert client.wait().finish_reason == "length"
    assert 5 <= len(client.generation.sequence.new_tokens) < 20
    until(lambda: service.unfinished == 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_no_request_outlives_the_thread(service):
    def explode():
        raise SystemExit

    running, waiting, late = (
        Client(3, 400, lambda n: service.call(explode) if n == 3 else None),
        Client(3, 9),
        Client(3, 9),
    )
    service.submit(running.generation)
    assert running.wait().error == "the engine has stopped"
    service.submit(late.generation)
    assert late.wait().finish_reason == "error"
    service.submit(waiting.generation)
    assert waiting.wait().finish_reason == "error"


def test_a_client_that_cannot_be_reached_disturbs_nobody(service):
    def vanish(n):
        raise RuntimeError("the loop is closed")

    gone, other = Client(3, 20, vanish), Client(5, 20)
    service.submit(gone.generation)
    service.submit(other.generation)
    assert other.wait().finish_reason == "length"
    assert service.alive
