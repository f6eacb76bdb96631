"""Caches that go through calls together: what they have in common is planned and noted once."""

from collections.abc import Sequence

from litgpt.kvcache.base import KVCache
from litgpt.kvcache.plan import Plan
from litgpt.kvcache.planned import PlannedKVCache
from litgpt.kvcache.row_state import RowState


class Lockstep:
    """Caches with equal plans. If they share a `RowState`, a call is noted for all of them at once; one that is changed by itself
    gets its own.

    Attributes:
        caches: at least one.
        layers: their layers.
        rows: that they share (None: they do not).
    """

    def __init__(self) -> None:
        self.caches: list[KVCache] = []
        self.layers: list[int] = []
        self.rows: RowState | None = None

    def share_rows(self, known: Sequence["Lockstep"]) -> None:
        """Have the caches share their `RowState`, which may be that of one of `known`."""
        for other in known:
            if other.rows is None or other.caches != self.caches:
                continue
            if all(cache.has_rows(other.rows) for cache in self.caches):
                self.rows = other.rows
                return
        rows = RowState(*self.caches[0].row_fields)
        for cache in self.caches:
            cache.set_rows(rows)
        self.rows = rows

    def commit(self, plan: Plan) -> None:
        """`commit` of each."""
        self.rows.fields = self.caches[0].fields_after(plan)


def group(caches: Sequence[KVCache], known: Sequence[Lockstep]) -> list[Lockstep]:
    """Caches with equal plans together; they share their `RowState`, as some of `known` may do already, if all changes of all caches
    are noted."""
    found: list[tuple[tuple, Lockstep]] = []
    for layer, cache in enumerate(caches):
        key = cache.plan_key()
        same = next((one for other, one in found if other == key), None)
        if same is None:
            same = Lockstep()
            found.append((key, same))
        same.caches.append(cache)
        same.layers.append(layer)
    groups = [one for _, one in found]
    if all(map(_can_share, groups)):
        for one in groups:
            one.share_rows(known)
    return groups


def _can_share(one: Lockstep) -> bool:
    caches = one.caches
    return all(isinstance(cache, PlannedKVCache) and cache.notes_changes for cache in caches) and all(
        cache.row_fields == caches[0].row_fields for cache in caches
    )
