"""CUDA graphs of PyTorch's operators without a GPU: what is called while one is captured is called
again, with the same tensors, when it is replayed."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WITHOUT_WORK = {torch.ops.aten.new_empty.default, torch.ops.aten.empty.memory_format}


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph. A graph's memory is what its tensors held when it was
    captured; it is poisoned when the capture ends, for on a GPU nothing has run by then."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._mode: _Recorder | None = None
        self.replays = 0

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._mode = _Recorder(self._calls)
        self._mode.__enter__()

    def capture_end(self) -> None:
        assert self._mode is not None, "no capture"
        self._mode.__exit__(None, None, None)
        self._mode = None
        for _, _, _, result in self._calls:
            for tensor in _tensors(result):
                if tensor.is_floating_point() and not tensor._is_view():
                    tensor.fill_(float("nan"))

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self._calls:
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function not in _WITHOUT_WORK:
            self._calls.append((function, args, kwargs, result))
        return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
