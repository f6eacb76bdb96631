"""Makes texts with facts in them, questions about these, and how the texts go on, as tokens."""

import json
from pathlib import Path
from random import Random

from timing import read_job, report

from litgpt.api import LLM
from litgpt.kvcache.memory import largest
from litgpt.prompt_frame import PromptFrame
from litgpt.tasks.document import lines_of, read_document
from litgpt.tasks.ruler import ask_number, number_line
from litgpt.tasks.sample import Prompt, Sample, insert
from litgpt.tasks.words import draw_words, number

INTRO = "The text below gives some words secret numbers. Remember them; they will be asked for."


def main() -> None:
    job = read_job()
    llm = LLM.load(job["checkpoint"], precision="bf16-true")
    tokenizer = llm.tokenizer
    prose, document = lines_of(read_document(None)), tokenizer.encode(read_document(None), bos=False).tolist()
    frame, samples = PromptFrame(tokenizer, llm.prompt_style), []
    for i in range(job["samples"]):

        def make(n: int, i: int = i) -> Sample:
            random = Random(f"press {i}")
            start = random.randrange(len(prose))
            lines = [prose[(start + j) % len(prose)] for j in range(n)]
            keys, values = draw_words(random, job["facts"]), [number(random) for _ in range(job["facts"])]
            places = [round(j * n / (job["facts"] - 1)) for j in range(job["facts"])]
            lines, where = insert(lines, list(map(number_line, keys, values)), places)
            return Sample(INTRO, tuple(lines), tuple(map(ask_number, keys, values, where)))

        lines = largest(lambda n, make=make: len(Prompt(make(n), frame).context) <= job["length"], job["length"])
        prompt = Prompt(make(lines), frame)
        queries = [[prompt.question(j), prompt.right(j)] for j in range(job["facts"])]
        samples.append({"kind": "facts", "context": prompt.context, "queries": queries})
        start = 4 * i * job["length"] % (len(document) - job["length"] - job["follow"])
        text = document[start : start + job["length"] + job["follow"]]
        bos = [] if tokenizer.bos_id is None or not tokenizer.use_bos else [tokenizer.bos_id]
        context = bos + text[: job["length"]]
        samples.append({"kind": "text", "context": context, "queries": [[[], text[job["length"] :]]]})
    Path(job["out"]).write_text(json.dumps(samples), encoding="utf-8")
    report({"samples": len(samples), "context": [len(sample["context"]) for sample in samples]})


if __name__ == "__main__":
    main()
