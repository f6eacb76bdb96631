"""Questions about a long document: prefilled anew, or from a session that holds it already."""

import hashlib
import time
from pathlib import Path

import torch
from timing import read_job, read_tokens, report

from litgpt.engine.loading import make_ready
from litgpt.engine.session import Session
from litgpt.model import GPT

NEW_TOKENS = 8


def main() -> None:
    job = read_job()
    model = make_ready(job["checkpoint"], "bf16-true", device=torch.device("cpu")).model
    text = read_tokens(job, job["document"] + job["question"])
    cache = job["kv_cache"], job["cache_length"]
    report(measure(model, text[: job["document"]], text[job["document"] :], job["session"], job["kind"], cache))


def measure(
    model: GPT,
    document: list[int],
    question: list[int],
    path: str,
    kind: str,
    cache: tuple[str, int | None] = ("dense", None),
) -> dict:
    """Seconds until the answer's first token is there, its first tokens, and a digest of the logits for the question after it.

    Args:
        model: loaded; its first calls are not counted.
        document, question: tokens, the question follows.
        path: file of the session.
        kind: "fresh" prefills everything, "save" the document, and saves it before the question comes, "restore" loads it.
        cache: the sessions' cache and its slots.
    """
    list(Session(model, *cache).generate(document[:64], 2, temperature=0))
    session = Session(model, *cache)
    result = {}
    if kind == "save":
        session.extend(document)
        started = time.perf_counter()
        session.save(path)
        result["save"] = time.perf_counter() - started
    if kind == "restore":
        Path(path).read_bytes()  # from now on in the system's memory: how fast the disk is, is not the question
    started = time.perf_counter()
    if kind == "restore":
        session.load(path)
        result["load"] = time.perf_counter() - started
    answer = session.generate(document + question, NEW_TOKENS, temperature=0)
    first = next(answer)
    result["first"] = time.perf_counter() - started
    result |= {"tokens": [first, *answer], "reused": session.reused, "cache_bytes": session.cache_bytes}
    logits = session.predict(question).float().numpy().tobytes()  # after all that
    return result | {"logits": hashlib.sha256(logits).hexdigest()}


if __name__ == "__main__":
    main()
