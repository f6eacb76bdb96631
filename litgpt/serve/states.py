"""States of prompts that clients save by name: /v1/states."""

import asyncio
from typing import Any

import torch

from litgpt.engine.prefixes import KeptPrefix
from litgpt.engine.sampling import Sampling
from litgpt.engine.service import Generation, Service
from litgpt.engine.state_folder import StateFolder
from litgpt.errors import describe
from litgpt.serve.errors import ApiError, bad_request
from litgpt.serve.served import ServedModel

MOST_STATES = 100  # of a model


def _folder(served: ServedModel) -> StateFolder:
    if served.states is None:
        raise ApiError(501, "this server saves no states: it was started without --state_dir")
    return served.states


def check_name(served: ServedModel, name: str) -> None:
    """Raise `ApiError` if states are not saved, or the name is none."""
    try:
        _folder(served).path(name)
    except ValueError as error:
        raise bad_request(str(error), "name") from None


async def save_state(service: Service, served: ServedModel, name: str, tokens: torch.Tensor) -> dict[str, Any]:
    """Compute a prompt, and save its state in a file, from which prompts that begin with it go on."""
    known = [one for one, _ in served.prefixes.named()]
    if name not in known and len(known) >= MOST_STATES:
        raise ApiError(409, f"there are {MOST_STATES} states already: remove one", "name", "too_many_states")
    folder, loop = _folder(served), asyncio.get_running_loop()
    result: asyncio.Future[KeptPrefix] = loop.create_future()

    def give(kept: KeptPrefix | None, problem: str | None) -> None:
        if not result.done():  # it is once the client has left
            result.set_exception(
                ApiError(500, problem or "the prompt was not computed")
            ) if kept is None else result.set_result(kept)

    def deliver(generation: Generation, text: str) -> None:
        if generation.finish_reason is not None:
            kept = None if generation.sequence is None else generation.sequence.state
            loop.call_soon_threadsafe(give, kept, generation.error)

    generation = Generation(served.name, tokens, 1, Sampling(temperature=0), wants_state=True, deliver=deliver)
    service.submit(generation)
    try:
        kept = await result
    finally:
        service.cancel(generation)
    try:
        await asyncio.to_thread(folder.save, name, kept)
        loaded = await asyncio.to_thread(folder.load, name)
    except (OSError, ValueError) as error:
        raise ApiError(500, f"the state could not be saved: {describe(error)}") from None
    service.call(lambda: served.prefixes.name(name, loaded))
    return _described(name, loaded)


def _described(name: str, kept: KeptPrefix) -> dict[str, Any]:
    return {"id": name, "object": "state", "tokens": len(kept.tokens), "bytes": kept.n_bytes}


def list_states(served: ServedModel) -> list[dict[str, Any]]:
    _folder(served)
    return [_described(name, kept) for name, kept in served.prefixes.named()]


async def remove_state(service: Service, served: ServedModel, name: str) -> None:
    """Remove a state and its file."""
    check_name(served, name)
    try:
        await asyncio.to_thread(_folder(served).remove, name)
    except FileNotFoundError:
        raise ApiError(404, f"there is no state {name!r:.80}", "name", "state_not_found") from None
    service.call(lambda: served.prefixes.name(name, None))
