"""Writes a file of `torch.save` tensor by tensor."""

import io
import pickle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


class incremental_save:
    """A `torch.save` file whose tensors are written one by one, each of which may leave memory before the next.

    ```python
    with incremental_save(path) as saver:
        weights = {name: saver.store_early(tensor) for name, tensor in tensors}
        saver.save(weights)
    ```
    """

    def __init__(self, name: str | Path) -> None:
        self._file = torch._C.PyTorchFileWriter(str(name))
        self._records = 0
        self._saved = False

    def __enter__(self) -> "incremental_save":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.write_end_of_file()

    def store_early(self, tensor: torch.Tensor) -> Any:
        """Writes a tensor's values, and returns a placeholder for it in the object for `save`."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"only tensors are stored early, got {type(tensor).__name__}")
        return _Written(self._written(tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)))

    def save(self, obj: Any) -> None:
        """Writes the object, after which nothing more can be written."""
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(obj)
        self._file.write_record("data.pkl", buffer.getvalue(), len(buffer.getvalue()))
        self._saved = True

    def write(self, storage: torch.storage.TypedStorage) -> tuple[Any, ...]:
        """Writes the values of a storage, and returns the persistent id for them."""
        if self._saved:
            raise ValueError("the file was saved already: nothing can be added to it")
        values, key = storage._untyped_storage, str(self._records)  # the public way to it warns
        place = torch.serialization.location_tag(values)
        self._file.write_record(f"data/{key}", values.cpu(), values.nbytes())
        self._records += 1
        return "storage", getattr(torch, storage._pickle_storage_type()), key, place, storage._size()

    def _written(self, value: Any) -> Any:
        """The parts of a pickled tensor, with placeholders for storages."""
        if isinstance(value, torch.Tensor):  # a parameter's
            return self.store_early(value)
        if isinstance(value, tuple):
            return tuple(self._written(part) for part in value)
        return _Reference(self.write(value)) if isinstance(value, torch.storage.TypedStorage) else value


class _Reference:
    """A placeholder for a storage that was written."""

    def __init__(self, reference: tuple[Any, ...]) -> None:
        self.reference = reference


class _Written:
    """A placeholder for a tensor that was written: it is pickled as that tensor."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.parts


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, saver: incremental_save) -> None:
        super().__init__(buffer, protocol=2)
        self.saver = saver
        self.references: dict[int, tuple[Any, ...]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Reference):
            return obj.reference
        if not isinstance(obj, torch.storage.TypedStorage):
            return None
        key = obj._untyped_storage._cdata
        if key not in self.references:  # tensors that share their values share them in the file
            self.references[key] = self.saver.write(obj)
        return self.references[key]
