"""Automatic BPDA: gradients that follow the values of any model, found by watching it compute.

Backward pass differentiable approximation (Athalye et al. 2018) keeps a defence in the forward pass
and replaces its gradient. `BPDA` does so for a model of which nothing is known: it watches the
operations of a forward pass, and passes the gradient straight through those that have none, or one
that has nothing to do with their values. It changes no prediction.
"""

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Flag, auto
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

FLAT = {"round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "floor_divide", "__floordiv__"}
"""Operations whose derivative is zero wherever it exists."""
SLOPED = {
    *("sin", "cos", "tan", "tanh", "sigmoid", "erf", "atan", "arctan", "softsign"),
    *("frac", "remainder", "fmod", "__mod__", "clamp", "clip", "hardtanh", "hardsigmoid", "relu6"),
}
"""Operations on single values whose derivative may be far from the slope of their values."""
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
LOOKUPS = {"embedding", "__getitem__", "one_hot", "index_select", "gather", "take"}
"""Operations that read values at integer places."""
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

    With gradients, gives the model's outputs, or the first values in the same order that they were
    made from, as the logits before a softmax; predictions are the model's.

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
        # Found in the first pass, then kept: results must not depend on the batch.
        self._join: int | None = None
        self._raw: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        if not (images.requires_grad and torch.is_grad_enabled()):
            return self.model(images)
        if self._raw is None:
            outputs, watch = self._watched(images)
            self._raw = watch.before_squashing(outputs)
            self._join = watch.last_made if Through.IMAGES in self.through else None
        outputs, watch = self._watched(images)
        outputs = watch.unsquashed(outputs, self._raw)
        self.substituted, self.optimises = tuple(watch.found), watch.optimises
        return outputs

    def _watched(self, images: Tensor) -> tuple[Tensor, "_Watch"]:
        watch = _Watch(images.view_as(images), self.through, self._join)
        with _without_backward_hooks(self.model) as hooked, watch:
            outputs = self.model(watch.images)
        watch.found |= dict.fromkeys(hooked)
        return watch.with_gradient(outputs), watch


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


class _Watch(TorchFunctionMode):
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
        self._rows = list[Tensor]()
        """All connected tensors of two dimensions, in order."""

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
        return output

    def with_gradient(self, outputs: Tensor) -> Tensor:
        """The outputs, linked to what they stand for if they are cut."""
        cut = self._cut.get(id(outputs))
        if cut is None or cut.source is None:
            return outputs
        self._note("outputs without a gradient")
        return _linked(outputs, cut.source)

    def before_squashing(self, outputs: Tensor) -> int:
        """Number of the first tensor whose classes are everywhere in the outputs' order."""
        ordered = (number for number, raw in enumerate(self._rows) if _in_order(raw, outputs).all())
        return next(ordered, -1)

    def unsquashed(self, outputs: Tensor, number: int) -> Tensor:
        """What was squashed to these outputs, with the predictions of the outputs."""
        if number < 0 or number >= len(self._rows) or self._rows[number] is outputs:
            return outputs
        raw, predicted = self._rows[number].to(outputs.dtype), outputs.argmax(dim=1, keepdim=True)
        # Values that are equal when squashed: the prediction stays the model's.
        lead = (raw.amax(dim=1, keepdim=True) - raw.gather(1, predicted)).detach()
        raw = raw.scatter_add(1, predicted, lead * (1 + 1e-3))
        self.found["what squashes the outputs"] = None
        return torch.where(_in_order(raw, outputs)[:, None], raw, outputs)

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
        elif self._exported and tensors and self._comes_back(output):
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
        if name in LOOKUPS and sources:
            joined = self._looked_up(func, args, kwargs, output)
            if joined is not None:
                self._note(name)
                return joined
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

    def _looked_up(
        self, func: Callable[..., Any], args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Values read at integers made from the images, with the slope between their neighbours."""
        places = [each for each in _tensors_in((args, kwargs)) if not each.is_floating_point()]
        cut = self._cut.get(id(places[0])) if len(places) == 1 else None
        if cut is None or cut.source is None or output.shape[: cut.tensor.ndim] != cut.tensor.shape:
            return None
        place, sides = places[0], list[Tensor]()
        for step in (1, -1):

            def moved(each: Tensor, step: int = step) -> Tensor:
                return (each + step).clamp(place.min(), place.max()) if each is place else each

            with torch.no_grad():
                sides.append(func(*_with_tensors(args, moved), **_with_tensors(kwargs, moved)))
        slope = (sides[0] - sides[1]).to(cut.source.dtype) / 2
        moving = cut.source.view(*place.shape, *[1] * (output.ndim - place.ndim))
        return _linked(output.to(slope.dtype), slope * moving)

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
        if self._exported and unseen and not each.requires_grad and self._comes_back(each):
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

    def _comes_back(self, each: Tensor) -> bool:
        """Whether a tensor from outside torch may be made from the images, at any size."""
        if each.shape in self._recent:
            return True
        like = each.ndim == 4 and each.shape[:2] == self.images.shape[:2]
        if not like or not each.is_floating_point():
            return False
        resized = interpolate(self.images, each.shape[2:], mode="bilinear")
        pairs = (values.detach().flatten(1).double() for values in (resized, each))
        if bool((_correlation(*pairs) < RELATED).any()):
            return False
        self._recent[each.shape] = [resized]
        return True

    def _remember(self, output: Tensor, connected: bool) -> None:
        if connected and output.is_floating_point() and output.requires_grad:
            kept = self._recent.setdefault(output.shape, [])
            kept.append(output)
            del kept[:-4]
            if output.ndim == 2:
                self._rows.append(output)
        elif connected:
            self._cut.setdefault(id(output), _Cut(output, self._nearest(output)))

    def _note(self, what: str) -> None:
        self.found[f"{what} in {_place()}"] = None


def _in_order(raw: Tensor, outputs: Tensor) -> Tensor:
    """(B,) bool: whether the outputs never fall where `raw`, of the same shape, rises."""
    if raw.shape != outputs.shape:
        return torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
    rising = outputs.detach().gather(1, raw.detach().argsort(dim=1)).diff(dim=1)
    slack = 1e-6 * outputs.detach().abs().amax(dim=1, keepdim=True)
    return (rising >= -slack).all(dim=1)


@contextmanager
def _without_backward_hooks(model: Callable[[Tensor], Tensor]) -> Iterator[list[str]]:
    """Call the model without the hooks that change its modules' gradients; yields their owners."""
    kept, names = list[tuple[dict, dict]](), list[str]()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            if hooks:
                kept.append((hooks, dict(hooks)))
                names.append(f"a backward hook of {type(module).__name__}")
                hooks.clear()
    try:
        yield names
    finally:
        for hooks, before in kept:
            hooks.update(before)


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
