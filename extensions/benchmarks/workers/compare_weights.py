"""Fails unless files of `torch.save` hold the same tensors, bit for bit."""

from itertools import pairwise

import torch
from timing import read_job, report


def main() -> None:
    job = read_job()
    weights = [torch.load(file, mmap=True, weights_only=True) for file in job["files"]]
    for first, other in pairwise(weights):
        names = first.keys() ^ other.keys()
        names |= {name for name in first.keys() & other.keys() if not torch.equal(first[name], other[name])}
        if names:
            raise ValueError(f"the files {job['files']} differ in {', '.join(sorted(names))}")
    report({"tensors": len(weights[0])})


if __name__ == "__main__":
    main()
