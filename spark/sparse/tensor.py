"""A value that carries its mask through a stock convnet.

A `SparseTensor` stands for a feature map [B, C, h, w] that is zero outside the visible sites.  It is not a
`torch.Tensor`: it implements `__torch_function__`, so PyTorch hands every function called on it to `SparseTensor`,
which looks the function up in the rules of the value's *layout*:

- masked: `data` is the dense array [B, C, h, w], zero at masked sites.  The readable reference.
- packed: `data` is [N, C], one row a visible site, in the order of `sites.py`.
- padded: what `F.pad` leaves: dense and larger than the map, good only as the input of a convolution or a pooling.

A function without a rule raises `MissingRuleError`, naming the operator and the module that called it; nothing falls
back.

In-place functions (`relu_`, `+=`) rebind the data of the value they were called on, so aliases see the change as they
would with a tensor.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from spark.errors import UserError
from spark.sparse.sites import Sites, UnalignedError

Rule = Callable[..., Any]


class MissingRuleError(UserError, NotImplementedError):
    """An operator has no rule for sparse values: the encoder cannot be used, or needs a rule in `spark/sparse`.

    Attributes:
        located: the message names the module that called the operator.
    """

    located = False


@dataclass(frozen=True)
class Layout:
    """How the data of a sparse value lie in memory.

    Attributes:
        name: shown in messages.
        rules: function name -> rule, called as `rule(func, *args, **kwargs)` with the function that was called.
        from_dense: (array [B, C, h, w], sites) -> data.
        to_dense: (data, sites, shape (B, C, h, w), fill [1, C, 1, 1] or None) -> array [B, C, h, w], at masked sites
            the fill or zero.
    """

    name: str
    rules: Mapping[str, Rule]
    from_dense: Callable[[Tensor, Sites], Tensor]
    to_dense: Callable[[Tensor, Sites, tuple[int, int, int, int], Tensor | None], Tensor]


class Recipe(NamedTuple):
    """How to compute data again in the backward pass, from tensors that are kept for it anyway.

    The next operator then need not keep it: of convolution, norm and activation only the convolution's result stays.

    Attributes:
        compute: inputs -> data, without gradient.
        inputs: what some operator before has saved.
        version: of the data when the recipe was written; data that was changed in place since is no longer its result.
        terms: of a sum; the work of computing it again.
    """

    compute: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    version: int
    terms: int = 1


class Product(NamedTuple):
    """The matrix product that made data, for a factor per channel that may follow (a layer scale) to join.

    Attributes:
        rows: what was multiplied, [N, C].
        weight: [O, C, 1, 1].
        bias: [O].
        recipe: of the rows.
        versions: of rows, weight, bias and data when these were made; changed in place since, they do not fit.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor
    recipe: Recipe | None
    versions: tuple[int, ...]

    def fits(self, data: Tensor) -> bool:
        """Whether neither the data nor what made them was changed in place."""
        return self.versions == versions_of(self.rows, self.weight, self.bias, data)


def versions_of(*tensors: Tensor) -> tuple[int, ...]:
    """How often each was changed in place."""
    return tuple(x._version for x in tensors)


def _operator(name: str) -> Callable[..., Any]:
    """The method of an operator that PyTorch's own tensors have under this name."""
    method = getattr(torch.Tensor, name)
    return lambda self, *others: SparseTensor.__torch_function__(method, (), (self, *others))


class SparseTensor:
    """A feature map that is zero outside the visible sites.

    Attributes:
        recipe: how to compute the data again, where that saves memory; gone as soon as the data are replaced.
        product: what made them, where that may save more; gone likewise.

    Args:
        data: in the form of `layout`.
        sites: the visible sites.
        layout: how data lie, and the rules of that form.
        size: (B, C, h, w), in any memory order.
        channels_last: logical order of dimensions is [B, h, w, C] (after `permute(0, 2, 3, 1)`).
    """

    __slots__ = ("_data", "channels_last", "layout", "product", "recipe", "sites", "size4")

    def __init__(
        self,
        data: Tensor,
        sites: Sites,
        layout: Layout,
        size: tuple[int, int, int, int],
        channels_last: bool = False,
    ):
        self.data = data
        self.sites = sites
        self.layout = layout
        self.size4 = size
        self.channels_last = channels_last

    @property
    def data(self) -> Tensor:
        """In the form of the layout."""
        return self._data

    @data.setter
    def data(self, data: Tensor) -> None:
        self._data = data
        self.recipe: Recipe | None = None
        self.product: Product | None = None

    def like(
        self, data: Tensor, *, channels: int | None = None, channels_last: bool | None = None
    ) -> "SparseTensor":
        """The same sites with other data (and other channels, or the other order of dimensions)."""
        b, c, h, w = self.size4
        return SparseTensor(
            data,
            self.sites,
            self.layout,
            (b, c if channels is None else channels, h, w),
            self.channels_last if channels_last is None else channels_last,
        )

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Function name -> rule."""
        return self.layout.rules

    def to_dense(self, fill: Tensor | None = None) -> Tensor:
        """Array [B, C, h, w] with `fill` ([1, C, 1, 1]; default 0) at masked sites."""
        if self.channels_last:
            raise UserError("to_dense needs the order [B, C, h, w]: permute back first")
        return self.layout.to_dense(self.data, self.sites, self.size4, fill)

    @property
    def shape(self) -> torch.Size:
        """Shape of the map in the current order of dimensions."""
        b, c, h, w = self.size4
        return torch.Size((b, h, w, c) if self.channels_last else (b, c, h, w))

    def size(self, dim: int | None = None) -> Any:
        """Like `torch.Tensor.size`."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Always 4."""
        return 4

    @property
    def ndim(self) -> int:
        """Always 4."""
        return 4

    @property
    def dtype(self) -> torch.dtype:
        """Of the data."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Of the data."""
        return self.data.device

    @property
    def requires_grad(self) -> bool:
        """Of the data."""
        return self.data.requires_grad

    def __repr__(self) -> str:
        return f"SparseTensor({list(self.shape)}, {self.layout.name}, grid={self.sites.grid}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda v: isinstance(v, SparseTensor))
        values = [v for v in leaves if isinstance(v, SparseTensor)]
        first = values[0]
        for other in values[1:]:
            if other.sites is not first.sites:
                raise UserError("two sparse values with different masks met in one operation")
            if other.layout is not first.layout:
                raise UserError(f"a {first.layout.name} and a {other.layout.name} value met in one operation")
        rule = first.rules.get(_OPERATORS.get(func.__name__, func.__name__))
        if rule is None:
            missing = MissingRuleError(
                f"no sparse rule for operator {func.__name__!r} {_where()}, called on {first!r}"
            )
            missing.located = True
            raise missing
        try:
            return rule(func, *args, **kwargs)
        except (MissingRuleError, UnalignedError) as error:
            if error.located:
                raise
            located = type(error)(f"{error}; operator {func.__name__!r} {_where()}")
            located.located = True
            raise located from None
        except TypeError as error:
            try:
                inspect.signature(rule).bind(func, *args, **kwargs)
            except TypeError:
                missing = MissingRuleError(
                    f"no sparse rule for operator {func.__name__!r} with the named arguments "
                    f"{', '.join(kwargs) or '(none)'} {_where()}, called on {first!r}"
                )
                missing.located = True
                raise missing from error
            raise

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(f"sparse values have no attribute {name!r}")
        return lambda *args, **kwargs: SparseTensor.__torch_function__(method, (), (self, *args), kwargs)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Any:
        return self.add_(other)

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)  # type: ignore[call-overload]

    def __rsub__(self, other: Any) -> Any:
        return torch.sub(other, self)  # type: ignore[call-overload]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[call-overload]

    __rmul__ = __mul__

    def __imul__(self, other: Any) -> Any:
        return self.mul_(other)

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # type: ignore[call-overload]

    def __rtruediv__(self, other: Any) -> Any:
        return torch.reciprocal(self) * other  # type: ignore[arg-type]

    def __pow__(self, exponent: Any) -> Any:
        return torch.pow(self, exponent)  # type: ignore[call-overload]

    def __getitem__(self, index: Any) -> Any:
        return SparseTensor.__torch_function__(torch.Tensor.__getitem__, (), (self, index))

    def __neg__(self) -> Any:
        return torch.neg(self)  # type: ignore[arg-type]

    def __abs__(self) -> Any:
        return torch.abs(self)  # type: ignore[arg-type]

    # Without rules: refused by name, where Python would compare the identity of objects or complain of types.
    __hash__ = object.__hash__
    __eq__, __ne__ = _operator("__eq__"), _operator("__ne__")
    __lt__, __le__, __gt__, __ge__ = map(_operator, ("__lt__", "__le__", "__gt__", "__ge__"))
    __matmul__, __rpow__, __len__ = map(_operator, ("__matmul__", "__rpow__", "__len__"))


# `tensor + sparse` arrives under the operator's name.
_OPERATORS = {"__add__": "add", "__radd__": "add", "__mul__": "mul", "__rmul__": "mul", "__iadd__": "add_"}


def _where() -> str:
    """The module that called an operator, found on the stack (only for an error message)."""
    inner, root = None, None
    for frame in inspect.stack()[2:]:
        caller = frame.frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            inner = inner or caller
            root = caller
    if inner is None or root is None:
        return "outside any module"
    path = next((name for name, module in root.named_modules() if module is inner), "")
    return f"in module {path or '(root)'!r} ({type(inner).__name__})"


# Gradient checkpointing looks through its arguments for tensors, to know which devices' random state to restore.
pytree.register_pytree_node(
    SparseTensor,
    lambda v: ([v.data], (v.sites, v.layout, v.size4, v.channels_last)),
    lambda children, context: SparseTensor(next(iter(children)), *context),
)
