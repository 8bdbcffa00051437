"""Keeps transformers' classes as they are when vLLM makes an engine from them.

A model that vLLM does not implement itself runs transformers' code, and for that vLLM (0.32)
decorates the decoder's class in place for torch.compile: it gets another `__init__`, another
`__call__` and another base class. The learner's model has the same class, was made before, and
lacks what the new `__call__` needs; a later one could not even be made. Here the decoration is
moved to a subclass that only the engine's module uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_OWNER = "vllm"  # vLLM may decorate the classes of its own package


@dataclass(frozen=True, slots=True)
class _Decorated:
    """A class that vLLM has decorated, and its state before.

    Example: _Decorated(cls=Olmo2Model, bases=(Olmo2PreTrainedModel,), own={"__init__": ...})
    """

    cls: type
    bases: tuple[type, ...]
    own: dict[str, Any]  # vars(cls) before

    def undo(self) -> type:
        """Restores the class; returns a subclass of it as vLLM made it."""
        added = tuple(base for base in self.cls.__bases__ if base not in self.bases)
        missing = object()
        new = {k: v for k, v in vars(self.cls).items() if self.own.get(k, missing) is not v}
        self.cls.__bases__ = self.bases
        for key in new:
            if key in self.own:
                setattr(self.cls, key, self.own[key])
            else:
                delattr(self.cls, key)
        names = {"__module__": self.cls.__module__, "__qualname__": self.cls.__qualname__}
        served: type = type(self.cls)(self.cls.__name__, (self.cls, *added), new | names)
        return served


@contextmanager
def classes_kept() -> Iterator[Callable[[Any], None]]:
    """Restores the classes that vLLM decorates inside.

    Yields a function to be called inside with the engine: modules of its model that have such a
    class get the subclass with vLLM's decoration.
    """
    from vllm.compilation import decorators

    found: list[_Decorated] = []
    original = getattr(decorators, "_support_torch_compile", None)
    if original is None:  # neither vLLM 0.26 nor 0.32, which this was written for
        yield lambda engine: None
        return

    def decorate(cls: type, *arguments: Any, **named: Any) -> Any:
        before = _Decorated(cls, cls.__bases__, dict(vars(cls)))
        result = original(cls, *arguments, **named)
        if cls.__module__.partition(".")[0] != _OWNER and cls.__bases__ != before.bases:
            found.append(before)
        return result

    def settle(engine: Any) -> None:
        served = {}
        while found:
            decorated = found.pop()
            served[decorated.cls] = decorated.undo()

        def move(model: nn.Module) -> None:
            for module in model.modules():
                module.__class__ = served.get(type(module), type(module))

        if served:
            engine.apply_model(move)

    decorators._support_torch_compile = decorate
    try:
        yield settle
    finally:
        decorators._support_torch_compile = original
        while found:  # the engine was not made
            found.pop().undo()
