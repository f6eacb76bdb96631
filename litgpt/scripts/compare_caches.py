"""The command `compare_caches`."""

from pathlib import Path

import torch

from litgpt.api import LLM
from litgpt.checkpoint.find import find_checkpoint
from litgpt.comparison.grid import make_grid, parse_numbers, parse_tasks
from litgpt.comparison.records import Records
from litgpt.comparison.report import print_json, print_table, write_files
from litgpt.comparison.run import Comparison
from litgpt.comparison.table import rows_of
from litgpt.generate.options import ModelOptions
from litgpt.tasks.document import read_document
from litgpt.waiting import report_progress, tell, waiting


def compare_caches(
    checkpoint_dir: Path,
    caches: str = "dense,lastrec(n_sink=4)",
    budgets: float | str = "0.5,0.25,0.125",
    length: int | str = 4096,
    text: Path | None = None,
    tasks: str = "all",
    samples: int = 5,
    seed: int = 1234,
    out: Path = Path("out/compare_caches"),
    prompt_chunksize: int | None = None,
    quantize: str | None = None,
    precision: str | None = None,
    json: bool = False,
    threads: int | None = None,
) -> None:
    """Compare key-value caches on a model: quality, bytes, speed and peak memory of each at every budget.

    What is done is kept in the output folder: the same command again only does what is missing.

    Args:
        checkpoint_dir: Folder of a checkpoint, a .gguf file, or a model's name.
        caches: Names of caches with commas between them, each perhaps with arguments in brackets.
        budgets: Slots of caches that evict, as shares of the length. Others keep everything, at budget 1.
        length: Tokens of a sample, question and answer included; several with commas between them.
        text: A file of text to predict and to hide needles in. Default: Python's reference, which comes with it.
        tasks: speed, perplexity, retrieval (by depth), niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe; ruler for
            the last six, or all.
        samples: Samples of every task, of retrieval at every depth, and windows of the text.
        seed: Seed of the samples.
        out: Folder for runs.jsonl, table.md, table.csv and report.html.
        prompt_chunksize: Most tokens of a prefill call. Default: the whole prompt.
        quantize: Quantise the weights: int8 or int4.
        precision: bf16-true, 16-true or 32-true. Default: the fastest on the device.
        json: Print a JSON object for every row instead of the table.
        threads: Threads that compute on the CPU. Default: $OMP_NUM_THREADS, or one for every core.
    """
    names, shares = parse_tasks(tasks), parse_numbers("budgets", budgets, float)
    lengths, document = parse_numbers("length", length, int), read_document(text)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    count = ModelOptions(threads=threads).loading()["threads"]
    if count is not None:
        torch.set_num_threads(count)
    llm = LLM.load(find_checkpoint(checkpoint_dir), precision=precision, quantize=quantize)
    cells = make_grid(llm.model, caches, shares, lengths)
    with waiting("Making samples"):
        comparison = Comparison(llm, cells, names, document, samples, seed, prompt_chunksize)
    records, done, old, place = Records(out), [], 0, ""
    with waiting(lambda: f"Comparing caches: {place}", log=True):
        for i, (cell, task) in enumerate(comparison.runs):
            place = f"{task}, {cell.name}"
            report_progress(i, len(comparison.runs))
            record, new = comparison.run(cell, task, records)
            done.append(record)
            old += not new
    rows, model = rows_of(done), llm.config.name or llm.checkpoint_dir.name
    source = "Python's reference" if text is None else text.name
    title = f"Key-value caches of {model}"
    about = f"{', '.join(names)}; {samples} sample{'s' * (samples != 1)}, seed {seed}; text: {source}; {comparison.device} in {comparison.dtype}"
    files = write_files(rows, out, title, about)
    if json:
        print_json(rows)
    else:
        print_table(rows, title)
    if old:
        tell(f"{old} of {len(done)} runs were done before, and read from {records.path}")
    tell(f"Written: {', '.join(map(str, files))}")
