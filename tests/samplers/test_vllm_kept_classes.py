"""vLLM's decoration of transformers' classes reaches the engine's model and nothing else."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from rl_lora.samplers.vllm.kept_classes import classes_kept


class Wrapper:
    """What vLLM appends to a class's bases."""


def decorated(cls: type) -> type:
    """In place, as vLLM 0.32 does it: bases, __init__, __call__ and a mark."""
    cls.__bases__ = (*cls.__bases__, Wrapper)
    old_init = cls.__init__  # type: ignore[misc]

    def __init__(self: Any, *arguments: Any) -> None:
        old_init(self, *arguments)
        self.do_not_compile = True

    def __call__(self: Any, x: int) -> int:
        return -1 if self.do_not_compile else 0

    cls.__init__, cls.__call__ = __init__, __call__  # type: ignore[misc,method-assign]
    cls.mark = False  # type: ignore[attr-defined]
    return cls


@pytest.fixture
def decorators(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for vLLM's module, which takes seconds to import."""
    module = SimpleNamespace(_support_torch_compile=decorated)
    package = SimpleNamespace(decorators=module)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(compilation=package))
    monkeypatch.setitem(sys.modules, "vllm.compilation", package)
    return module


def make_class() -> type[nn.Module]:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: int) -> int:
            return x + 1

    return Decoder


def state_of(cls: type) -> tuple[Any, ...]:
    return cls.__bases__, {k: v for k, v in vars(cls).items() if k != "__static_attributes__"}


class Engine:
    """Has the one method that is called."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.num_calls = model, 0

    def apply_model(self, function: Any) -> None:
        self.num_calls += 1
        function(self.model)


def test_the_engine_has_the_decoration_and_the_learner_not(decorators: SimpleNamespace) -> None:
    decoder = make_class()
    before, learner = state_of(decoder), decoder()
    with classes_kept() as settle:
        decorators._support_torch_compile(decoder)
        engine = Engine(nn.Sequential(decoder()))
        with pytest.raises(AttributeError, match="do_not_compile"):
            learner(1)  # the control: what vLLM leaves behind
        settle(engine)
        assert state_of(decoder) == before
    served: Any = engine.model.get_submodule("0")
    assert served(1) == -1
    assert served.mark is False
    assert isinstance(served, decoder)
    assert isinstance(served, Wrapper)
    assert type(served).__qualname__ == decoder.__qualname__
    assert learner(1) == 2
    assert decoder()(1) == 2  # one that is made afterwards
    assert decorators._support_torch_compile is decorated
    with classes_kept() as settle:  # a second engine of the class
        decorators._support_torch_compile(decoder)
        second = Engine(decoder())
        settle(second)
    assert second.model.__class__.__name__ == "Decoder"
    assert state_of(decoder) == before


def test_an_engine_that_cannot_be_made_leaves_the_classes_as_well(
    decorators: SimpleNamespace,
) -> None:
    decoder = make_class()
    before = state_of(decoder)
    with contextlib.suppress(ValueError), classes_kept():
        decorators._support_torch_compile(decoder)
        raise ValueError("no")
    assert state_of(decoder) == before


def test_vllms_own_classes_are_vllms(decorators: SimpleNamespace) -> None:
    decoder = make_class()
    decoder.__module__ = "vllm.model_executor.models.llama"
    with classes_kept() as settle:
        decorators._support_torch_compile(decoder)
        engine = Engine(decoder())
        settle(engine)
    assert Wrapper in decoder.__bases__
    assert engine.num_calls == 0  # an engine in other processes is not bothered
