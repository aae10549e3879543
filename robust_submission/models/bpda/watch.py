"""Watches one forward pass, operation by operation, and mends gradients on the way."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.functional import interpolate
from torch.overrides import TorchFunctionMode

from robust_submission.models.bpda.gradients import (
    RELATED,
    correlation,
    filtered,
    is_identity,
    is_same,
    linked,
    sloped,
    unsaturated,
)
from robust_submission.models.bpda.operations import (
    EXPORTS,
    FALLING,
    FLAT,
    LOOKUPS,
    POINTWISE,
    PRODUCTS,
    REPLACING,
    RISING,
    SLOPED,
    UNCHANGED,
    Through,
    place,
    tensors_in,
    with_tensors,
)


class _Cut(NamedTuple):
    """A tensor made from the images, without a gradient to them."""

    tensor: Tensor
    source: Tensor | None
    """The nearest connected tensor of the same shape, which it stands for."""


class _NoHook:
    """In place of a hook's handle, where the hook was not registered."""

    def remove(self) -> None:
        """Nothing is there to remove."""


class Watch(TorchFunctionMode):
    """Sees every operation of one forward pass, and gives its output the gradient it should have.

    A tensor is *connected* if autograd follows it back to the images, and *cut* if it was made from
    them and is not connected. A cut tensor may be a mask for connected values, whose true
    derivative is zero. So it is linked to its source only where an operation would otherwise lose
    the images.
    """

    def __init__(
        self, images: Tensor, through: Through, join: int | None, passed: Tensor | None = None
    ) -> None:
        super().__init__()
        self.images = images
        self.last_made = 0
        """Number of the last tensor that is the images, changed; `join` links that one to them."""
        self.joined: Tensor | None = None
        """The values of that one."""
        self._join, self._passed = join, passed
        self._made = 0
        self.found = dict[str, None]()
        self.optimises = False
        self._through = through
        self._cut = dict[int, _Cut]()
        self._constants = dict[int, Tensor]()
        self._recent = {images.shape: [images]}
        self._exported = False
        self.rows = list[Tensor]()
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
            return func(*with_tensors(args, Tensor.detach), **kwargs)
        self.optimises |= name in ("grad", "backward")
        with torch.inference_mode(False), torch.enable_grad():
            if name == "requires_grad_" and self._connected(args[0]):
                args[0].retain_grad()  # a model that calls backward reads it
                return args[0]
            args, kwargs = with_tensors((args, kwargs), self._imported)
            flat = name.endswith("_") and name[:-1] in FLAT and self._connected(args[0])
            before = args[0].clone() if flat else None
            output = func(*args, **kwargs)
            if before is not None:
                output.copy_(self._substituted(name, output, before))
            elif isinstance(output, Tensor):
                output = self._examined(func, name, args, kwargs, output)
            else:
                connected = any(map(self._connected, tensors_in((args, kwargs))))
                for each in tensors_in(output):
                    self._remember(each, connected)
        return output

    def with_gradient(self, outputs: Tensor) -> Tensor:
        """The outputs, linked to what they stand for if they are cut."""
        cut = self._cut.get(id(outputs))
        if cut is None or cut.source is None:
            return outputs
        self._note("outputs without a gradient")
        return linked(outputs, cut.source)

    def _examined(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        tensors = list(tensors_in((args, kwargs)))
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
        made = id(output) not in self._cut and id(output) not in self._constants
        self._remember(output, made)
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
        if name in SLOPED or name == "softmax":
            honest = (unsaturated if name == "softmax" else sloped)(output, source)
            if honest is not output:
                self._note(name)
            return honest
        masked = name not in PRODUCTS or any(id(each) in self._cut for each in tensors)
        if Through.MASKS in self._through and name in REPLACING and masked:
            return self._substituted(name, output, source)
        return output if name in UNCHANGED else self._restored(name, tensors, output)

    def _restored(self, name: str, tensors: list[Tensor], output: Tensor) -> Tensor:
        """Give what equals an earlier tensor the gradient of the identity."""
        for earlier in self._recent.get(output.shape, ()):
            alike = earlier.dtype == output.dtype and earlier.device == output.device
            if alike and is_same(earlier, output):
                if any(each is earlier for each in tensors) and is_identity(output, earlier):
                    return output
                return self._substituted(name, output, earlier)
        return output

    def _rejoined(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor:
        """The output of an operation on cut tensors: still cut, or joined to the images."""
        cuts = [cut for each in tensors_in((args, kwargs)) if (cut := self._cut.get(id(each)))]
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
            return linked(values, cut.source)

        before = list(tensors_in((args, kwargs)))
        args, kwargs = with_tensors((args, kwargs), link)
        if all(map(operator.is_, before, tensors_in((args, kwargs)))):
            return None
        try:
            joined = func(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError):
            return None
        good = isinstance(joined, Tensor) and joined.requires_grad and joined.shape == output.shape
        return joined if good and is_same(joined.to(output.dtype), output) else None

    def _looked_up(
        self, func: Callable[..., Any], args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Values read at integers made from the images, with the slope between their neighbours."""
        places = [each for each in tensors_in((args, kwargs)) if not each.is_floating_point()]
        cut = self._cut.get(id(places[0])) if len(places) == 1 else None
        if cut is None or cut.source is None or output.shape[: cut.tensor.ndim] != cut.tensor.shape:
            return None
        place, sides = places[0], list[Tensor]()
        for step in (1, -1):

            def moved(each: Tensor, step: int = step) -> Tensor:
                return (each + step).clamp(place.min(), place.max()) if each is place else each

            with torch.no_grad():
                sides.append(func(*with_tensors(args, moved), **with_tensors(kwargs, moved)))
        slope = (sides[0] - sides[1]).to(cut.source.dtype) / 2
        moving = cut.source.view(*place.shape, *[1] * (output.ndim - place.ndim))
        return linked(output.to(slope.dtype), slope.to(moving.device) * moving)

    def _to_images(self, name: str, output: Tensor) -> Tensor:
        """Count what is made of the images, image by image; link the chosen one to them."""
        known = self._connected(output) or id(output) in self._cut
        if output.shape != self.images.shape or not output.is_floating_point() or not known:
            return output
        self._made += 1
        if self._join not in (None, self._made):
            return output
        if self._join is None:
            pairs = (
                each.detach().flatten(1).to(self.images.device, torch.float64)
                for each in (self.images, output)
            )
            if bool((correlation(*pairs).abs() > RELATED).all()):
                self.last_made = self._made
            return output
        self._note(f"images to {name}")
        self._cut.pop(id(output), None)
        self.joined = output.detach()
        source = self.images if self._passed is None else filtered(self.images, self._passed)
        return linked(output, source)

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
            return linked(each, source)
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
        return linked(output, source)

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
        pairs = (
            values.detach().flatten(1).to(resized.device, torch.float64)
            for values in (resized, each)
        )
        if bool((correlation(*pairs) < RELATED).any()):
            return False
        self._recent[each.shape] = [resized]
        return True

    def _remember(self, output: Tensor, connected: bool) -> None:
        if connected and output.is_floating_point() and output.requires_grad:
            kept = self._recent.setdefault(output.shape, [])
            kept.append(output)
            del kept[:-4]
            if output.ndim == 2 and output.device == self.images.device:
                self.rows.append(output)
        elif connected:
            self._cut.setdefault(id(output), _Cut(output, self._nearest(output)))

    def _note(self, what: str) -> None:
        self.found[f"{what} in {place()}"] = None
