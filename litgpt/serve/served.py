"""A model that is served: its prompts, limits, batch and kept prefixes."""

from dataclasses import dataclass

from litgpt.engine.caches import CacheLease
from litgpt.engine.continuous import ContinuousBatch
from litgpt.engine.loading import Ready
from litgpt.engine.prefixes import PrefixStore
from litgpt.engine.second_reading import reading_twice
from litgpt.engine.state_folder import StateFolder
from litgpt.serve.conversations import Conversations
from litgpt.serve.options import ServeOptions

DEFAULT_LENGTH = 8192  # most tokens of a row of dense caches where no length is given


@dataclass(eq=False)
class ServedModel:
    """A model with its batch."""

    name: str
    ready: Ready
    batch: ContinuousBatch
    prefixes: PrefixStore | None
    limit: int | None  # most tokens of a sequence
    conversations: Conversations
    states: StateFolder | None

    @classmethod
    def of(cls, name: str, ready: Ready, options: ServeOptions, prefix_bytes: int) -> "ServedModel":
        """A model with a batch of its own; states of its rows take at most `prefix_bytes`."""
        options = options.as_trained(ready.trained_cache)
        model = ready.model
        options.assign_caches(model, options.batch_size)
        if options.batch_size > 1 and reading_twice(model.kv_caches()):
            raise ValueError(
                f"{options.kv_cache} reads a long prompt twice, which takes the model for itself: serve one answer at a time "
                "(--batch_size 1), or use another cache"
            )
        lease = CacheLease.take(model)
        takes_rows = model.caches.default or not model.caches.caches or model.caches.takes_rows_apart
        keeps = takes_rows and (prefix_bytes or options.state_dir is not None)
        prefixes = PrefixStore(prefix_bytes) if keeps else None
        states = None
        if options.state_dir is not None:
            if prefixes is None:
                raise ValueError(f"state_dir needs caches whose rows can be taken apart, not {options.kv_cache}")
            states = StateFolder(options.state_dir / name, model, options.cache_spec())
            for known, kept in states.load_all():
                prefixes.name(known, kept)
        length = None
        if not model.caches.caches or model.caches.default:
            length = min(model.max_seq_length, options.cache_length or DEFAULT_LENGTH)
        batch = ContinuousBatch(
            model, options.batch_size, length, options.prompt_chunksize, lease=lease, prefixes=prefixes
        )
        caches = lease.caches or model.caches
        limit = None if caches.unbounded else min(model.max_seq_length, caches.max_length or model.max_seq_length)
        evicts = prefixes is not None and any(cache.evicts for cache in caches.caches)
        conversations = Conversations(ready.tokenizer, ready.prompt_style, evicts)
        return cls(name, ready, batch, prefixes, limit, conversations, states)

    @property
    def room(self) -> int:
        """Most tokens of a prompt and its answer; where there is no limit, of an answer for which the client sets none."""
        return self.ready.model.max_seq_length if self.limit is None else self.limit
