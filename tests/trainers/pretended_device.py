"""A device that is pretended: a tensor of it holds one on the CPU, and refuses to meet another device's as a GPU's tensor would.
Registered with torch as its backend for further devices (PrivateUse1), once a process and for good: for processes of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten

TAKES_OTHERS = {aten.copy_.default, aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
"""Operations whose further arguments may lie elsewhere: copies, and indices on the CPU, which CUDA takes as well."""
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default}
"""Operations that end in a number or a shape that Python sees: a GPU is waited for."""


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", backend_module=_Module())
DEVICE = torch.device("pretended", 0)
reads: list[str] = []
"""The operation of each time that a value left the device, the newest last."""


class PretendedTensor(torch.Tensor):
    """A tensor of the pretended device. It computes with the CPU's kernels, so results are the CPU's bit for bit: but for the
    backward pass of `torch.nn.functional.silu`, which torch writes out for tensors of any class but its own."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.held})"

    def tolist(self) -> Any:  # torch has none for a tensor of a class of its own
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> PretendedTensor:
        if id(self) not in memo:
            copied = PretendedTensor(self.held.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        values = tree_leaves((args, kwargs))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        own = {id(value.held): value for value in tensors if isinstance(value, cls)}
        strangers = [value for value in tensors if not isinstance(value, cls) and value.ndim]  # a number may come from the CPU
        if strangers and (operation not in TAKES_OTHERS or (operation != aten.copy_.default and args[0] is strangers[0])):
            shapes = ", ".join(str(list(value.shape)) for value in strangers)
            raise RuntimeError(f"{operation}: a tensor {shapes} on the CPU meets one on {DEVICE}")
        leaves = any(isinstance(value, torch.device) and value.type == "cpu" for value in values) or (operation == aten.copy_.default and not isinstance(args[0], cls))
        if leaves or operation in READS or (operation == aten.index.Tensor and any(each is not None and each.dtype == torch.bool for each in args[1])):
            reads.append(str(operation))
        result = operation(*tree_map(_held, args), **tree_map(_held, kwargs))
        if operation == aten.copy_.default:
            return args[0]

        def named(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if leaves:
                return value.clone() if id(value) in own else value
            known = own.get(id(value))
            if known is not None and known.shape != value.shape:
                raise AssertionError(f"{operation} changed the shape of a tensor in place, which this device cannot follow")
            return PretendedTensor(value) if known is None else known

        return tree_map(named, result)


def _held(value: Any) -> Any:
    """What the CPU computes with in place of a value."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.held if isinstance(value, PretendedTensor) else value


def _factory(operation: Any) -> Any:
    def make(*args: Any, device: torch.device | None = None, pin_memory: bool | None = None, **kwargs: Any) -> PretendedTensor:
        return PretendedTensor(operation(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


def _local_scalar_dense(source: PretendedTensor) -> float:
    reads.append("_local_scalar_dense")
    return source.held.item()


_library = torch.library.Library("aten", "IMPL")
for _operation in (
    aten.empty.memory_format, aten.empty_strided.default, aten.arange.default, aten.arange.start, aten.arange.start_step,
):  # fmt: skip
    _library.impl(_operation.name().removeprefix("aten::"), _factory(_operation), "PrivateUse1")
for _kernel in (_copy_from, _local_scalar_dense):  # `torch.tensor(..., device=...)` calls them past `__torch_dispatch__`
    _library.impl(_kernel.__name__, _kernel, "PrivateUse1")
