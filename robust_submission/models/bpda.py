"""Automatic BPDA: gradients that follow the values of any model, found by watching it compute.

Backward pass differentiable approximation (Athalye et al. 2018) keeps a defence in the forward pass
and replaces its gradient. `BPDA` does so for a model of which nothing is known: it watches the
operations of a forward pass, and passes the gradient straight through those that have none, or one
that has nothing to do with their values. It changes no prediction.
"""

import operator
import sys
from collections.abc import Callable, Iterator
from enum import Flag, auto
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

FLAT = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "floor_divide", "__floordiv__"}
"""Operations whose derivative is zero wherever it exists."""
SLOPED = {
    *("sin", "cos", "tan", "tanh", "sigmoid", "erf", "atan", "arctan", "softsign"),
    *("frac", "remainder", "fmod", "__mod__", "clamp", "clip", "hardtanh", "hardsigmoid", "relu6"),
}
"""Operations on single values whose derivative may be far from the slope of their values."""
SQUASHING = {"softmax", "log_softmax", "sigmoid", "tanh", "softsign", "hardsigmoid", "atan", "erf"}
"""Operations that keep the order of the outputs and flatten their differences."""
RISING = {"gt", "ge", "greater", "greater_equal", "__gt__", "__ge__"}
FALLING = {"lt", "le", "less", "less_equal", "__lt__", "__le__"}
"""Comparisons, by the sign of their slope in the first argument."""
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
REPLACING = {"where", "masked_fill", "scatter", "index_put", *PRODUCTS}
"""Operations that drop some of the values; a product does so if a factor is a mask."""
POINTWISE = {
    *("add", "sub", "div", "true_divide", "neg", "clone", "contiguous", "minimum", "maximum"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__truediv__", "__neg__", "rsub"),
    *("float", "to", "type", "type_as", "double", "half", "bfloat16", "byte", "int", "long"),
    *("bool", "detach", "cpu", "cuda", "logical_not", "__invert__", "bitwise_and", "__and__"),
    *("__get__", "__lshift__", "__rshift__", *FLAT, *SLOPED, *PRODUCTS),
}
"""Operations after which a value without a gradient still stands for the value before them."""
UNCHANGED = {"clone", "contiguous", "dropout", "to", "float", "view", "reshape", "requires_grad_"}
"""Operations that change no value in eval mode, with the gradient of the identity."""
EXPORTS = {"numpy", "tolist", "__array__", "item"}
"""Ways out of torch."""
STEEP = 100.0
"""How many times the slope of the values a derivative may be, or the slope the derivative."""
EQUAL = 1e-3
"""Largest difference, in units of the largest value, of tensors that count as the same."""
RELATED = 0.3
"""Smallest correlation of a tensor with what it stands for."""
SATURATED = 50.0
"""Difference of a softmax's two largest inputs from which on its gradient is lost in float32."""


class Through(Flag):
    """What the gradient is passed straight through."""

    OPERATIONS = auto()
    """Operations without a derivative that follows their values, and cuts of the graph."""
    MASKS = auto()
    """Operations that drop values, such as winners-take-all."""
    IMAGES = auto()
    """Whatever makes images of the same shape from the images."""


class BPDA(nn.Module):
    """A model with the gradient passed straight through what hides it.

    Gives the model's outputs, or what goes into the last operation that only squashes them, with
    the same predictions.

    Args:
        model: From images (B, 3, H, W), float32, 0 to 1, to outputs (B, num_classes).
        through: What to look for.
    """

    substituted: tuple[str, ...] = ()
    """What was found in the last pass that recorded gradients: "round in masked.py:21"."""
    optimises: bool = False
    """Whether the model called autograd itself in that pass."""

    def __init__(self, model: Callable[[Tensor], Tensor], through: Through) -> None:
        super().__init__()
        self.model = model
        self.through = through
        self._join: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            with _WatchSquashing() as watch:
                outputs = self.model(images)
            return watch.unsquashed(outputs)
        if self._join is None and Through.IMAGES in self.through:
            self._join = self._watched(images)[1].last_made
        outputs, watch = self._watched(images)
        outputs = watch.with_gradient(outputs)
        self.substituted, self.optimises = tuple(watch.found), watch.optimises
        return watch.unsquashed(outputs)

    def _watched(self, images: Tensor) -> tuple[Tensor, "_Watch"]:
        with _Watch(images.view_as(images), self.through, self._join) as watch:
            return self.model(watch.images), watch


class _Link(torch.autograd.Function):
    """One tensor's values with another's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, source: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0].to(ctx.dtype)


def _linked(values: Tensor, source: Tensor) -> Tensor:
    linked = _Link.apply(values.detach(), source)
    assert isinstance(linked, Tensor)
    return linked


class _Cut(NamedTuple):
    """A tensor made from the images, without a gradient to them."""

    tensor: Tensor
    source: Tensor | None
    """The nearest connected tensor of the same shape, which it stands for."""


class _NoHook:
    """In place of a hook's handle, where the hook was not registered."""

    def remove(self) -> None:
        """Nothing is there to remove."""


class _WatchSquashing(TorchFunctionMode):
    """Remembers what goes into operations that only squash outputs."""

    def __init__(self) -> None:
        super().__init__()
        self._squashed = dict[int, tuple[Tensor, Tensor]]()  # by id: squashed, and before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._squashes(func.__name__, args, output)
        return output

    def _squashes(self, name: str, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim != 2:
            return
        for each in _tensors_in(args):
            if each.shape != output.shape:
                continue
            if id(each) in self._squashed and name in POINTWISE | SQUASHING | {"log", "clamp_min"}:
                self._squashed[id(output)] = output, self._squashed[id(each)][1]
            elif name in SQUASHING:
                self._squashed[id(output)] = output, each

    def unsquashed(self, outputs: Tensor) -> Tensor:
        """What was squashed to these outputs, if its largest entry is everywhere the largest."""
        if id(outputs) not in self._squashed:
            return outputs
        raw, predicted = self._squashed[id(outputs)][1], outputs.argmax(dim=1, keepdim=True)
        best = outputs.gather(1, raw.argmax(dim=1, keepdim=True)).squeeze(1)
        if bool((best < outputs.amax(dim=1)).any()):
            return outputs
        # Outputs that are equal when squashed: the prediction stays the model's.
        lead = (raw.amax(dim=1, keepdim=True) - raw.gather(1, predicted)).detach()
        return raw.scatter_add(1, predicted, lead * (1 + 1e-3))


class _Watch(_WatchSquashing):
    """Sees every operation of one forward pass, and gives its output the gradient it should have.

    A tensor is *connected* if autograd follows it back to the images, and *cut* if it was made from
    them and is not connected. A cut tensor may be a mask for connected values, whose true
    derivative is zero. So it is linked to its source only where an operation would otherwise lose
    the images.
    """

    def __init__(self, images: Tensor, through: Through, join: int | None) -> None:
        super().__init__()
        self.images = images
        self.last_made = 0
        """Number of the last tensor that is the images, changed; `join` links that one to them."""
        self._join = join
        self._made = 0
        self.found = dict[str, None]()
        self.optimises = False
        self._through = through
        self._cut = dict[int, _Cut]()
        self._constants = dict[int, Tensor]()
        self._recent = {images.shape: [images]}
        self._exported = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name == "register_hook":
            self._note(name)
            return _NoHook()
        if name in EXPORTS:
            self._exported = True
            return func(*_with_tensors(args, Tensor.detach), **kwargs)
        self.optimises |= name in ("grad", "backward")
        with torch.inference_mode(False), torch.enable_grad():
            if name == "requires_grad_" and self._connected(args[0]):
                args[0].retain_grad()  # a model that calls backward reads it
                return args[0]
            args, kwargs = _with_tensors((args, kwargs), self._imported)
            flat = name.endswith("_") and name[:-1] in FLAT and self._connected(args[0])
            before = args[0].clone() if flat else None
            output = func(*args, **kwargs)
            if before is not None:
                output.copy_(self._substituted(name, output, before))
            elif isinstance(output, Tensor):
                output = self._examined(func, name, args, kwargs, output)
            else:
                connected = any(map(self._connected, _tensors_in((args, kwargs))))
                for each in _tensors_in(output):
                    self._remember(each, connected)
        self._squashes(name, args, output)
        return output

    def with_gradient(self, outputs: Tensor) -> Tensor:
        """The outputs, linked to what they stand for if they are cut."""
        cut = self._cut.get(id(outputs))
        if cut is None or cut.source is None:
            return outputs
        self._note("outputs without a gradient")
        linked = _linked(outputs, cut.source)
        self._squashed[id(linked)] = linked, cut.source
        return linked

    def _examined(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        tensors = list(_tensors_in((args, kwargs)))
        if output is next(iter(tensors), None):  # in place, or nothing to do
            return self._written(tensors)
        if any(map(self._connected, tensors)):
            if output.requires_grad:
                output = self._honest(name, tensors, output)
            elif not name.endswith("_like") and not name.startswith("new_"):
                self._cut[id(output)] = _Cut(output, self._stands_for(name, args, tensors, output))
        elif any(id(each) in self._cut for each in tensors):
            output = self._rejoined(func, name, args, kwargs, output)
        elif self._exported and tensors and output.shape in self._recent:
            self._cut[id(output)] = _Cut(output, self._nearest(output))
        else:
            self._constants[id(output)] = output
        if Through.IMAGES in self._through:
            output = self._to_images(name, output)
        self._remember(output, id(output) not in self._cut | self._constants)
        return output

    def _honest(self, name: str, tensors: list[Tensor], output: Tensor) -> Tensor:
        """A connected output with a gradient that follows its values."""
        source = next((each for each in tensors if self._connected(each)), output)
        if source.shape != output.shape:
            source = self._nearest(output)
        if source is None:
            return output
        if name in FLAT:
            return self._substituted(name, output, source)
        if name in SLOPED:
            return self._sloped(name, output, source)
        if name == "softmax":
            return self._unsaturated(name, output, source)
        masked = name not in PRODUCTS or any(id(each) in self._cut for each in tensors)
        if Through.MASKS in self._through and name in REPLACING and masked:
            return self._substituted(name, output, source)
        return output if name in UNCHANGED else self._restored(name, tensors, output)

    def _restored(self, name: str, tensors: list[Tensor], output: Tensor) -> Tensor:
        """Give what equals an earlier tensor the gradient of the identity."""
        for earlier in self._recent.get(output.shape, ()):
            if earlier.dtype == output.dtype and _is_same(earlier, output):
                if any(each is earlier for each in tensors) and _is_identity(output, earlier):
                    return output
                return self._substituted(name, output, earlier)
        return output

    def _sloped(self, name: str, output: Tensor, source: Tensor) -> Tensor:
        """Replace the derivative of images on which it is far from the slope of the values."""
        (derivative,) = torch.autograd.grad(output.sum(), source, retain_graph=True)
        sizes = derivative.detach().flatten(1).abs().nan_to_num(torch.inf)
        inputs, values = (each.detach().flatten(1).double() for each in (source, output))
        slope = values.std(dim=1) / inputs.std(dim=1).clamp_min(1e-300)
        flat = sizes.quantile(0.9, dim=1) * STEEP < slope
        wild = sizes.median(dim=1).values > STEEP * slope
        if not bool((flat | wild).any()):
            return output
        self._note(name)
        related = _correlation(inputs, values)
        factor = torch.where(related.abs() > RELATED, slope * related.sign(), 0).to(output.dtype)
        shape = (-1, *[1] * (output.ndim - 1))
        straight = _linked(output, source * factor.view(shape))
        return torch.where((flat | wild).view(shape), straight, output)

    def _unsaturated(self, name: str, output: Tensor, source: Tensor) -> Tensor:
        """Give a saturated softmax the gradient of a softer one."""
        if source.shape[-1] < 2:
            return output
        top = source.detach().topk(2, dim=-1).values
        gap = top[..., :1] - top[..., 1:]
        if not bool((gap > SATURATED).any()):
            return output
        self._note(name)
        soft = (source / torch.where(gap > SATURATED, gap / 10, 1)).softmax(dim=-1)
        return _linked(output, soft)

    def _rejoined(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        """The output of an operation on cut tensors: still cut, or joined to the images."""
        cuts = [cut for each in _tensors_in((args, kwargs)) if (cut := self._cut.get(id(each)))]
        sources = [cut.source for cut in cuts if cut.source is not None]
        same = next((each for each in sources if each.shape == output.shape), None)
        if name not in POINTWISE and sources:
            joined = self._repeated(func, args, kwargs, output)
            if joined is not None and not output.is_floating_point():
                same = joined
            elif joined is not None:
                self._note(name if cuts[0].tensor.is_floating_point() else "integers")
                return joined
        self._cut[id(output)] = _Cut(output, self._nearest(output) if same is None else same)
        return output

    def _repeated(
        self, func: Callable[..., Any], args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """The same operation on linked arguments; None if that is another or impossible."""

        def link(each: Tensor) -> Tensor:
            cut = self._cut.get(id(each))
            if cut is None or cut.source is None or each.requires_grad:  # for the model's autograd
                return each
            values = each if each.is_floating_point() else each.to(cut.source.dtype)
            return _linked(values, cut.source)

        before = list(_tensors_in((args, kwargs)))
        args, kwargs = _with_tensors((args, kwargs), link)
        if all(map(operator.is_, before, _tensors_in((args, kwargs)))):
            return None
        try:
            joined = func(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None
        good = isinstance(joined, Tensor) and joined.requires_grad and joined.shape == output.shape
        return joined if good and _is_same(joined.to(output.dtype), output) else None

    def _to_images(self, name: str, output: Tensor) -> Tensor:
        """Count what is made of the images, image by image; link the chosen one to them."""
        known = self._connected(output) or id(output) in self._cut
        if output.shape != self.images.shape or not output.is_floating_point() or not known:
            return output
        self._made += 1
        if self._join not in (None, self._made):
            return output
        pairs = (each.detach().flatten(1).double() for each in (self.images, output))
        related = _correlation(*pairs)
        if self._join is None:
            if bool((related.abs() > RELATED).all()):
                self.last_made = self._made
            return output
        self._note(f"images to {name}")
        self._cut.pop(id(output), None)
        return _linked(output, self.images * related.sign().to(output.dtype).view(-1, 1, 1, 1))

    def _written(self, tensors: list[Tensor]) -> Tensor:
        """The tensor that an operation wrote into."""
        target, others = tensors[0], tensors[1:]
        known = self._exported or any(id(each) in self._cut for each in others)
        if not target.requires_grad and known and id(target) not in self._cut:
            self._cut[id(target)] = _Cut(target, self._nearest(target))
        return target

    def _imported(self, each: Tensor) -> Tensor:
        """An argument that no operation was seen to make: from outside torch, or autograd's own."""
        if each.requires_grad and not each.is_leaf and self._is_foreign(each):
            source = self._nearest(each)
            if source is None:
                return each
            self._note(type(each.grad_fn).__name__.removesuffix("Backward"))
            return _linked(each, source)
        unseen = id(each) not in self._cut and id(each) not in self._constants
        if self._exported and unseen and not each.requires_grad and each.shape in self._recent:
            self._cut[id(each)] = _Cut(each, self._nearest(each))
        return each

    def _is_foreign(self, each: Tensor) -> bool:
        node = each.grad_fn
        if not isinstance(node, BackwardCFunction):
            return False
        home = getattr(type(node), "_forward_cls", type(node)).__module__.partition(".")[0]
        return home not in ("torch", "timm", __name__.partition(".")[0])

    def _stands_for(
        self, name: str, args: Any, tensors: list[Tensor], output: Tensor
    ) -> Tensor | None:
        """What an output without a gradient stands for."""
        if name in RISING | FALLING:
            first, second = args[:2]
            difference = first - second if name in RISING else second - first
            if difference.shape == output.shape and difference.requires_grad:
                return difference
        same = (each for each in tensors if self._connected(each) and each.shape == output.shape)
        return next(same, self._nearest(output))

    def _substituted(self, name: str, output: Tensor, source: Tensor) -> Tensor:
        self._note(name)
        return _linked(output, source)

    def _connected(self, each: Tensor) -> bool:
        return each.requires_grad and not each.is_leaf and id(each) not in self._cut

    def _nearest(self, like: Tensor) -> Tensor | None:
        """The last connected tensor of this shape that autograd's own operations made."""
        recent = self._recent.get(like.shape, ())
        return next((each for each in reversed(recent) if not self._is_foreign(each)), None)

    def _remember(self, output: Tensor, connected: bool) -> None:
        if connected and output.is_floating_point() and output.requires_grad:
            kept = self._recent.setdefault(output.shape, [])
            kept.append(output)
            del kept[:-4]
        elif connected:
            self._cut.setdefault(id(output), _Cut(output, self._nearest(output)))

    def _note(self, what: str) -> None:
        self.found[f"{what} in {_place()}"] = None


def _is_same(first: Tensor, second: Tensor) -> bool:
    scale = first.detach().abs().amax()
    return bool((first.detach() - second.detach()).abs().amax() <= EQUAL * scale)


def _is_identity(output: Tensor, source: Tensor) -> bool:
    """Whether the gradient of one operation, added up, is about that of the identity."""
    (gradient,) = torch.autograd.grad(output.sum(), source, retain_graph=True)
    return bool((gradient - 1).abs().amax() < 0.1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Of each row of (B, N): (B,), 0 where one is constant."""
    first, second = (each - each.mean(dim=1, keepdim=True) for each in (first, second))
    sizes = first.norm(dim=1) * second.norm(dim=1)
    return ((first * second).sum(dim=1) / sizes.clamp_min(1e-300)).nan_to_num()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors_in(each)


def _with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The arguments of a call with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _with_tensors(each, change) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_with_tensors(each, change) for each in value)
    return value


def _place() -> str:
    """File and line of the model's code that is being run."""
    frame, ours = sys._getframe(1), (str(Path(torch.__file__).parent), __file__)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
