"""A group of processes with a model divided among them: start, rendezvous and end."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

CPU_PROCESSES = 2  # default number without GPUs
_USER_ERRORS = (ValueError, OSError, IndexError, MemoryError)  # keep their type between processes


def launched_outside() -> tuple[int, int] | None:
    """Rank and number of processes if started by a launcher such as `torchrun`; otherwise None."""
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None


def number_of_processes(devices: int | None) -> int:
    """Number of processes for `devices` (None: all).

    Raises:
        ValueError: if there are fewer GPUs, or a launcher has started another number.
    """
    if (outside := launched_outside()) is not None:
        if devices not in (None, outside[1]):
            raise ValueError(f"devices={devices}, but there are {outside[1]} processes (WORLD_SIZE): leave it out")
        return outside[1]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices is None:
        return gpus or CPU_PROCESSES
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if gpus and devices > gpus:
        raise ValueError(f"devices={devices}, but there are {gpus} GPUs")
    return devices


def own_device(rank: int) -> torch.device:
    """The device of this process: its own GPU if there are any, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
    torch.cuda.set_device(device)
    return device


def join_group(store: dist.Store | None = None, rank: int = -1, world_size: int = -1) -> None:
    """Join a group of processes (by default the environment's), unless in one already.

    Tensors on the CPU go by gloo, tensors on GPUs by NCCL.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


@contextmanager
def only_first_speaks(rank: int) -> Iterator[None]:
    """Drop the output of all processes but the first."""
    if rank == 0:
        yield
        return
    stdout, stderr = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr


def run_in_processes(function: Callable[..., None], count: int, *args: Any) -> None:
    """Call `function(rank, *args)` in `count` new processes that form a group, and wait for them; if one fails, the others are
    killed.

    Args:
        function: importable by other processes.

    Raises:
        ValueError, OSError, IndexError, MemoryError, RuntimeError: the first error in a process.
    """
    context = get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: any that is free
    errors = context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(function, rank, count, store.port, errors, args)) for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        running = list(processes)
        while running:
            connection.wait([process.sentinel for process in running])
            # read once: a sentinel closes shortly before the exit code is set
            codes = {process: process.exitcode for process in running}
            if any(codes.values()):
                raise _cause(processes, errors)
            running = [process for process, code in codes.items() if code is None]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        for process in processes:
            if process.pid is not None:
                process.join()


def _cause(processes: list[SpawnProcess], errors: SimpleQueue) -> BaseException:
    """The first error of a process, which caused later ones."""
    for rank, process in enumerate(processes):
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            return RuntimeError(f"process {rank} of {len(processes)} was ended by {name}, perhaps for lack of memory")
    if not errors.empty():
        return errors.get()
    rank = next(rank for rank, process in enumerate(processes) if process.exitcode)
    return RuntimeError(f"process {rank} of {len(processes)} ended with exit code {processes[rank].exitcode}")


def _work(
    function: Callable[..., None], rank: int, count: int, port: int, errors: SimpleQueue, args: tuple[Any, ...]
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if not torch.cuda.is_available():  # all on one machine
            torch.set_num_threads(max(1, torch.get_num_threads() // count))
        join_group(dist.TCPStore("127.0.0.1", port, is_master=False), rank, count)
        function(rank, *args)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:
        if os.environ.get("LITGPT_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        text = " ".join(str(error).split())
        errors.put(
            type(error)(text) if type(error) in _USER_ERRORS else RuntimeError(f"{type(error).__name__}: {text}")
        )
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    """Exit at once: a regular exit takes seconds, or waits for other processes."""
    sys.stdout.flush()
    os._exit(code)


def _end_with_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)
