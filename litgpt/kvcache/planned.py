"""Caches whose calls are planned from numbers that the host knows."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch

from litgpt.keys_and_values import DefaultKeysAndValues, KeysAndValues, join
from litgpt.kvcache.composed import ComposedKVCache
from litgpt.kvcache.new_tokens import NewTokens
from litgpt.kvcache.plan import Part, Plan, Step
from litgpt.kvcache.row_state import RowState


class PlannedKVCache(ComposedKVCache):
    """Attends over what its storage holds, step by step as planned. Arguments as for `ComposedKVCache`.

    Attributes:
        watch: told the queries and sinks of every call, if there is one.
    """

    watch: Callable[[torch.Tensor, torch.Tensor | None], None] | None = None

    @abstractmethod
    def plan(
        self,
        input_pos: int,
        batch_size: int,
        T: int | Sequence[int],
        rows: Sequence[int] | None = None,
        static: bool = False,
    ) -> Plan:
        """Plan a call with T new tokens for each of `batch_size` rows (`rows` names them; None: the first ones). Several T,
        one for every row, are for a call of shape (1, sum(T)), which has the rows one after the other.

        `input_pos=0` empties the rows of the call first; without `rows` it starts a new batch, and all others are gone.

        Raises:
            ValueError: a wrong batch size, row or position.
            IndexError: more tokens than there are slots, where the policy does not evict.
        """

    @abstractmethod
    def fields_after(self, plan: Plan) -> tuple[tuple[int, ...], ...]:
        """The numbers of the rows after `plan`, as `row_fields`."""

    def commit(self, plan: Plan) -> None:
        """Note that `plan` was run."""
        self._rows = RowState(*self.fields_after(plan))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor,
        input_pos: int,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `KVCache.forward`; `sink_logits` as for `run`."""
        self._check_dtype(query, key, value)
        self._check_shapes(query, key, value)
        plan = self.plan(input_pos, key.shape[0], key.shape[2])
        try:
            output = self.run(plan, query, key, value, token_idx, sink_logits)
        except BaseException:
            self.clear()  # slots may be half written: better empty than wrong
            raise
        self.commit(plan)
        return output

    def run(
        self,
        plan: Plan,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        token_idx: torch.Tensor | None = None,
        sink_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        plan = self.prepare(plan, sink_logits)
        if query.dtype != self._place[0] or key.dtype != query.dtype or value.dtype != query.dtype:
            return self._run_in_own_dtype(plan, query, key, value, token_idx, sink_logits)
        new = NewTokens(query, key, value, sink_logits, self._is_recorded(plan, query, key, value, sink_logits))
        if len(plan.parts) == 1 and plan.parts[0].spans is None:
            output = self._run_part(plan.parts[0], new)
        else:
            output = query.new_empty(*query.shape[:-1], value.shape[-1])
            for part in plan.parts:
                if part.spans is None:
                    output[part.chunk_rows] = self._run_part(part, new.of_rows(part.chunk_rows))
                    continue
                for span, of_row in zip(part.spans, self._run_part(part, new.of_spans(part.spans)), strict=True):
                    output[0, :, span] = of_row
        if self.watch is not None:
            self.watch(query, sink_logits)
        return output.transpose(1, 2).flatten(2)

    def _run_in_own_dtype(self, plan: Plan, *tensors: torch.Tensor | None) -> torch.Tensor:
        """`run` under autocast: in the cache's dtype, with a result in that of the queries. `tensors` as for `run`."""
        inputs, others = tensors[:3], tensors[3:]
        self._check_dtype(*inputs)
        with torch.autocast(inputs[0].device.type, enabled=False):
            return self.run(plan, *(x.to(self.dtype) for x in inputs), *others).to(inputs[0].dtype)

    def _is_recorded(self, plan: Plan, *inputs: torch.Tensor | None) -> bool:
        """Whether autograd records what is done with these inputs. A first call forgets what it recorded of earlier sequences."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if not any(plan.before):
            self.storage.detach_graph()
        return any(x is not None and x.requires_grad for x in (*inputs, *self.storage.buffers()))

    def _run_part(self, part: Part, new: NewTokens) -> torch.Tensor:
        outputs = [self._run_step(step, part.rows, new) for step in part.steps]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _run_step(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        """Output (B, H, T, D) of one step in `rows` of the cache (None: the first ones)."""
        if step.write_first and step.write is not None:
            self._write(step, rows, new)
        output = self._attend(step, rows, new)
        if not step.write_first and step.write is not None:
            self._write(step, rows, new)
        return output

    def _write(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> None:
        if new.recording:
            self.storage.detach_writes()
        self.storage.set(_take(new.key, step.write), _take(new.value, step.write), step.slots, rows)

    def _attend(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> torch.Tensor:
        kv, query = self._keys_values(step, rows, new), _take(new.query, step.queries)
        if step.consecutive is not None:
            return self.mha.attend_consecutive(query, kv, step.consecutive, sink_logits=new.sink_logits)[0]
        bias = step.bias if step.mask is None else step.mask.bias
        return self.mha.attend(query, kv, bias, False, sink_logits=new.sink_logits)[0]

    def _keys_values(self, step: Step, rows: torch.Tensor | None, new: NewTokens) -> KeysAndValues:
        if step.new is not None:
            own = self.storage.as_stored(_take(new.key, step.new), _take(new.value, step.new))
            if step.read is None:
                return DefaultKeysAndValues(own.keys(), own.values())
        slots = slice(0, step.bias.shape[-1]) if step.read is None else step.read
        old = self.storage.get(new.key.shape[0], slots, rows)
        return old if step.new is None else join(old, own)

    # -- errors

    def _check_call(
        self, input_pos: int, batch_size: int, T: int | Sequence[int], rows: Sequence[int] | None
    ) -> tuple[int, ...]:
        """Lengths of all rows as the call finds them."""
        sizes = [T] * batch_size if isinstance(T, int) else list(T)
        if len(sizes) != batch_size or min(sizes, default=0) < 1:
            raise ValueError(f"a call needs at least one token for each of {batch_size} rows, got {T}")
        if input_pos == 0 and rows is None:
            self._check_batch_size(batch_size)
            lengths = (0,) * batch_size
        else:
            lengths = self._rows.lengths_before(input_pos, batch_size, rows)
        chosen = range(len(lengths)) if rows is None else rows
        longest = max(lengths[row] + size for row, size in zip(chosen, sizes, strict=True))
        if not self.policy.evicts and longest > self.cache_length:
            raise IndexError(
                f"{longest} tokens do not fit into a dense cache of cache_length={self.cache_length}: "
                "enlarge it, or use a cache that evicts"
            )
        return lengths

    def _check_dtype(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        dtype, device = self._place[0], query.device.type
        if query.dtype == key.dtype == value.dtype == dtype or (device != "meta" and torch.is_autocast_enabled(device)):
            return
        raise ValueError(
            f"query, key and value must be {dtype}, the cache's dtype, got {query.dtype}, {key.dtype}, {value.dtype}"
        )

    # -- together with the caches of other layers

    @property
    def notes_changes(self) -> bool:
        """Whether `litgpt.kvcache.changes` notes all that plans and kernels depend on: not that of methods made elsewhere."""
        methods = [getattr(self, name) for name in ("plan_key", "prepare", "commit", "kept_queries")]
        methods += [getattr(self.storage, name) for name in ("kernel_view", "kernel_codes")]
        return all(method.__module__.startswith("litgpt.") for method in methods)

    def has_rows(self, rows: RowState) -> bool:
        """Whether these are the cache's own, not others with equal numbers."""
        return self._rows is rows

    def set_rows(self, rows: RowState) -> None:
        """Share the numbers of rows, which have to be equal, with other caches, until this one gets others."""
        self._rows = rows

    # -- calls again, in training

    @property
    def row_fields(self) -> tuple[tuple[int, ...], ...]:
        """The numbers that describe the rows in use, as `refill` takes them."""
        return self._rows.fields

    def refill(self, row_fields: tuple[tuple[int, ...], ...], key: torch.Tensor, value: torch.Tensor) -> None:
        """Hold keys and values (B, G, n, D), which may require gradients, in the first n slots, for rows of these fields."""
        self._rows = RowState(*row_fields)
        self.storage.detach_graph()
        self.storage.detach_writes()
        if key.shape[2]:
            key, value = key.to(self.dtype), value.to(self.dtype)  # under autocast they are in its precision
            self.storage.set(key, value, torch.arange(key.shape[2], device=key.device), None)


def _take(x: torch.Tensor, tokens: slice | torch.Tensor) -> torch.Tensor:
    """Some tokens of a chunk (B, heads, T, D); x itself where they are all."""
    if isinstance(tokens, slice) and tokens.start == 0 and tokens.stop == x.shape[2]:
        return x
    return x[:, :, tokens]
