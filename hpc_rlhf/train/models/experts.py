"""Low-rank adaptation of experts, whose matrices are the slices of one parameter.

transformers keeps a mixture's experts as parameters of shape (experts, outputs, inputs) or (experts, inputs, outputs).
peft (target_parameters) computes each whole updated parameter in every pass, and autograd then keeps it: a second copy
of most of the model. Here the experts' own code multiplies by an ``UpdatedWeight``, which multiplies by the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_rlhf.errors import HpcRlhfError
from hpc_rlhf.train.parallel.deepspeed_internals import full_shape, is_zero3

# Experts whose parameters are (experts, inputs, outputs), of classes that do not say so themselves.
_INPUTS_FIRST = {("Llama4TextExperts", "gate_up_proj"), ("Llama4TextExperts", "down_proj"), ("DbrxExpertGLU", "w2")}
# Experts whose parameters are matrices: the experts one below the other.
_STACKED = "DbrxExpertGLU"
# Experts whose code calls F.linear, which DeepSpeed replaces under ZeRO-3 by a function of nothing but tensors.
_NOT_UNDER_ZERO3 = ("JetMoeParallelExperts", "LongcatFlashExperts", "Step3p7Experts")
# Bytes to which the rows of matrices in a grouped product are aligned.
_ALIGNED = 16
_PRODUCTS: set[Any] = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, F.grouped_mm}


def parameters_of_experts(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """The parameters that hold experts: their modules, their names in them, and the names that people know them by."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            if "Expert" in kind and len(full_shape(parameter)) == (2 if kind == _STACKED else 3):
                yield module, name, path.rpartition(".")[2] if name == "weight" else name


def check_sharding(module: nn.Module, name: str) -> None:
    """Refuse experts that cannot be adapted under ZeRO-3."""
    kind = type(module).__name__
    if kind in _NOT_UNDER_ZERO3 and is_zero3(module.get_parameter(name)):
        raise HpcRlhfError(
            f"{kind} cannot be adapted under ZeRO-3",
            where="lora.experts",
            hint="set zero: 2, or lora.experts: false to leave experts out",
        )


def layout(module: nn.Module, name: str) -> tuple[int, int, int, bool]:
    """Experts, inputs and outputs of a parameter, and whether the inputs come first."""
    *stack, rows, columns = full_shape(module.get_parameter(name))
    if not stack:
        stack = [cast(int, module.moe_num_experts)]
        rows //= stack[0]
    first = bool(getattr(module, "is_transposed", False)) or (type(module).__name__, name) in _INPUTS_FIRST
    return stack[0], rows if first else columns, columns if first else rows, first


class UpdatedWeight:
    """``weight + scale * left @ right`` for code that multiplies by it; anything else gets the sum.

    Shapes: weight (..., rows, columns), left (..., rows, rank), right (..., rank, columns).
    """

    def __init__(self, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
        self.weight, self.left, self.right, self.scale = weight, left, right, scale
        self.shape, self.dtype, self.device, self.data_ptr = weight.shape, weight.dtype, weight.device, weight.data_ptr

    def whole(self) -> Tensor:
        return self.weight + (self.left @ self.right).view_as(self.weight) * self.scale

    def __getitem__(self, experts: Any) -> UpdatedWeight:
        return UpdatedWeight(self.weight[experts], self.left[experts], self.right[experts], self.scale)

    def view(self, *shape: Any) -> UpdatedWeight:
        return UpdatedWeight(self.weight.view(*shape), self.left, self.right, self.scale)

    def transpose(self, *dims: int) -> UpdatedWeight:
        return UpdatedWeight(
            self.weight.transpose(*dims), self.right.transpose(*dims), self.left.transpose(*dims), self.scale
        )

    @property
    def T(self) -> UpdatedWeight:
        return self.transpose(0, 1)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and isinstance(args[1], cls):
            x, updated, *bias = args
            update = F.linear(F.linear(x, updated.right), updated.left) * updated.scale
            return F.linear(x, updated.weight, *bias, **kwargs) + update
        if func in _PRODUCTS and isinstance(args[0], Tensor):
            x, updated = args
            left, right = updated.left, updated.right
            beyond = left.shape[-1] * left.element_size() % _ALIGNED
            if func is F.grouped_mm and beyond:
                missing = (_ALIGNED - beyond) // left.element_size()
                left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
            return func(x, updated.weight, **kwargs) + func(func(x, left, **kwargs), right, **kwargs) * updated.scale
        return func(*(each.whole() if isinstance(each, cls) else each for each in args), **kwargs)


def read_updated(module: nn.Module, name: str, updated: Callable[[nn.Parameter], Any]) -> None:
    """From now on, a module's own code reads what ``updated`` makes of a parameter where it reads the parameter.

    The parameter stays where it is, so that ZeRO-3 gathers it, and the factors beside it, for the module's passes.
    """

    def read(self: nn.Module) -> Any:
        return self.__dict__["_read"][name](self._parameters[name])

    module.__dict__.setdefault("_read", {})[name] = updated
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {name: property(read), "__module__": kind.__module__})
