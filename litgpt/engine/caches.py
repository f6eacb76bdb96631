"""Which caches a model runs with, and whether sequences fit into them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock, get_ident
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from litgpt.kvcache import CacheSpec
from litgpt.kvcache.layers import LayerCaches
from litgpt.kvcache.memory import check_fits
from litgpt.model import GPT

ROOM = 1024  # least capacity in tokens of default caches with `roomy`
COMPILED_ROOM = 4096  # the same for compiled code

T = TypeVar("T")


def prepare_caches(model: GPT, batch_size: int, max_length: int, roomy: bool = False) -> None:
    """Ensure that the model's caches take `batch_size` rows of `max_length` tokens, before any work is done.

    Default caches are made or enlarged; assigned caches are only checked. `roomy` makes default caches larger than needed, so
    that longer sequences fit later; so does compiled code, which depends on their size.

    Raises:
        ValueError: if the sequences are longer than the model's context, or the caches too small.
    """
    model.expect_length(max_length)
    caches = model.caches.caches
    if not caches or model.caches.default:
        if max_length > model.max_seq_length:
            raise ValueError(too_long(model.max_seq_length, max_length))
        fits = caches and all(
            cache.batch_size >= batch_size and (cache.evicts or cache.cache_length >= max_length) for cache in caches
        )
        if not fits:
            room = max_length
            if roomy or model.static_shapes:
                room = max(COMPILED_ROOM if model.static_shapes else ROOM, 1 << (max_length - 1).bit_length())
            room = min(room, model.max_seq_length)
            check_fits(CacheSpec(), model, batch_size, room, model.caches.size_in_bytes())
            model.set_kv_caches(batch_size, max_seq_length=room)
    check_caches(model, batch_size, max_length)


def check_caches(model: GPT, batch_size: int, max_length: int) -> None:
    """Check that the model's caches take `batch_size` rows of `max_length` tokens.

    Raises:
        ValueError: if they do not.
    """
    caches = model.caches
    if caches.batch_size < batch_size:
        raise ValueError(f"{batch_size} sequences at once, but the caches hold batch_size={caches.batch_size}")
    if batch_size > 1 and not caches.takes_rows_apart:
        kind = next(type(cache).__name__ for cache in caches.caches if not cache.takes_rows_apart)
        raise ValueError(
            f"{batch_size} sequences at once, but {kind} cannot drop or reorder rows: generate one sequence at a time"
        )
    if max_length > model.max_seq_length and not caches.unbounded:
        raise ValueError(too_long(model.max_seq_length, max_length))
    if caches.max_length is not None and caches.max_length < max_length:
        raise ValueError(
            f"prompt and new tokens come to {max_length} tokens, but the cache holds cache_length={caches.max_length} "
            "and does not evict: ask for fewer tokens, or use a longer or an evicting cache"
        )


def too_long(context: int, max_length: int) -> str:
    """Why a model with a context of so many tokens refuses a sequence of `max_length`."""
    return (
        f"prompt and new tokens come to {max_length} tokens, but the model's context is {context}: "
        "shorten the prompt, ask for fewer tokens, or use a cache that evicts (lastrec)"
    )


@dataclass
class _Use:
    """The current user of a model."""

    lock: Lock = field(default_factory=Lock)
    thread: int | None = None  # holds the lock
    displaced: LayerCaches | None = None  # the model's own caches while it runs with a lease's
    claim: object = None  # of the lease with sequences in the model's own caches
    running: "CacheLease | None" = None  # its caches are in the model


_uses: WeakKeyDictionary[GPT, _Use] = WeakKeyDictionary()
_uses_lock = Lock()


class CacheLease:
    """The caches that one user of a model runs it with: either its own, which are in the model only during a run, or the
    model's, in place.

    One thread at a time runs a model. After an interrupt at any point the next run finds the model's own caches in the model,
    and the caches of the interrupted run are empty.

    Args:
        model: runs with the caches.
        caches: of the lease's own, perhaps still to be made by `prepare_caches` (None: the model's, in place).
    """

    def __init__(self, model: GPT, caches: LayerCaches | None = None) -> None:
        self.model = model
        self._caches = caches
        with _uses_lock:
            self._use = _uses.setdefault(model, _Use())
        self._interrupted = False
        self._claim: object = None

    @property
    def caches(self) -> LayerCaches | None:
        """The lease's own caches, emptied after an interrupt (None: it uses the model's)."""
        if self._interrupted and self._use.running is not self:
            for cache in self._caches.caches:
                cache.clear()
            self._interrupted = False
        return self._caches

    @classmethod
    def take(cls, model: GPT) -> "CacheLease":
        """A lease for a call without caches of its own: on caches that were assigned to the model, in place; else on its default
        caches, which are the lease's until `release`, or on new ones."""
        lease = cls(model)
        return lease._locked(lease._take)

    def _take(self) -> "CacheLease":
        own = self._own_caches()
        if own.caches and not own.default:
            return self
        self._set_own_caches(LayerCaches())
        self._caches = own
        return self

    def release(self) -> None:
        """Return default caches to the model for the next call, unless it has others by now."""
        if self._caches is not None:
            self._locked(self._release)

    def _release(self) -> None:
        caches, self._caches = self._caches, LayerCaches()
        if caches.default and not self._own_caches().caches:
            self._set_own_caches(caches)

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)` with the lease's caches in the model."""
        return self._locked(self._run, function, *args)

    def claim(self) -> None:
        """Begin new sequences in the caches. A lease with earlier sequences in the same caches is then `overtaken`."""
        self._claim = object()
        if self._caches is None:
            self._use.claim = self._claim

    @property
    def overtaken(self) -> bool:
        """Whether another lease has begun sequences in the same caches."""
        return self._caches is None and self._use.claim is not self._claim

    def _locked(self, function: Callable[..., T], *args: Any) -> T:
        use = self._use
        if use.thread == get_ident() and use.lock.locked():  # nested, e.g. called by a hook
            return function(*args)
        with use.lock:
            use.thread, use.running = get_ident(), None
            try:
                if use.displaced is not None:  # left in the model by an interrupt
                    self.model.exchange_kv_caches(use.displaced)
                    use.displaced = None
                return function(*args)
            finally:
                use.thread = use.running = None

    def _run(self, function: Callable[..., T], *args: Any) -> T:
        use = self._use
        if self._caches is None or use.running is self:
            return function(*args)
        found, others, placed = self.model.caches, use.running, False
        outermost = use.displaced is None
        try:
            if outermost:
                use.displaced = found
            caches = self.caches
            self._interrupted, use.running = True, self
            self.model.exchange_kv_caches(caches, attach=False)
            placed = True
            result = function(*args)
            self._interrupted = False
            return result
        except Exception:
            self._interrupted = not placed  # `LayerCaches` clears itself after a failure
            raise
        finally:
            if placed:
                self._caches = self.model.caches
            use.running = others
            self.model.exchange_kv_caches(use.displaced if outermost and use.displaced is not None else found)
            if outermost:
                use.displaced = None

    def _own_caches(self) -> LayerCaches:
        return self.model.caches if self._use.displaced is None else self._use.displaced

    def _set_own_caches(self, caches: LayerCaches) -> None:
        if self._use.displaced is None:
            self.model.exchange_kv_caches(caches)
        else:
            self._use.displaced = caches
