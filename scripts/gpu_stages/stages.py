"""The stages, what each gets, and the error of a failed check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Stage:
    """A function run in its own process: `function` is module:name and takes a Context.

    Example: Stage("libraries", call=1, function="gpu_stages.libraries:libraries", limit_s=45)
    """

    name: str
    call: int  # 1 to 3, or 4 for what other visits are for: see docs/gpu-check.md
    function: str
    limit_s: float  # on a GPU; on a CPU the limit is CPU_LIMIT_S
    takes_turns: bool = False  # calls `Context.turn`


@dataclass(frozen=True, slots=True)
class Context:
    """What a stage works with.

    Example: Context(device=torch.device("cuda"), out=Path("out"), work=Path("/tmp/check"))
    """

    device: torch.device
    out: Path  # what is kept: results.jsonl, logs, compile caches
    work: Path  # models, runs and caches; the next call reuses them
    gguf: tuple[Path, ...] = field(default=())  # the embedded model's file, in parts
    # Records figures so far, which are reported if the stage is ended or fails later.
    keep: Callable[[dict[str, Any]], None] = field(default=lambda figures: None)
    # Around what no other stage may disturb, once or more often.
    turn: Callable[[], AbstractContextManager[None]] = field(default=contextlib.nullcontext)
    is_shared: bool = False  # other stages use the GPU's memory at the same time

    @property
    def is_gpu(self) -> bool:
        """True: real sizes; False: tiny ones."""
        return self.device.type == "cuda"


class CheckFailedError(Exception):
    """A check failed; figures: what was measured until then."""

    def __init__(self, message: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


CPU_LIMIT_S = 300.0  # with two cores

# Most important first within a call: `--total` may leave no time for the last ones. On the lent
# machine the first PyTorch and vLLM imports take 27 s, an eager engine 40 to 50 s, one with graphs
# a minute, and the learner's first compiled step 50 to 85 s.
STAGES = (
    Stage("libraries", 1, "gpu_stages.libraries:libraries", 45),
    Stage("parity-bfloat16", 1, "gpu_stages.parity:bfloat16", 90),
    Stage("release", 1, "gpu_stages.release:release", 75, takes_turns=True),
    Stage("parity-float32", 1, "gpu_stages.parity:float32", 80),
    Stage("learn-smollm2-135m", 2, "gpu_stages.learn:smollm2", 125, takes_turns=True),
    Stage("learn-qwen3-8b", 2, "gpu_stages.learn:qwen3_large", 125, takes_turns=True),
    Stage("convert", 3, "gpu_stages.loop:convert", 40),
    Stage("grpo", 3, "gpu_stages.loop:grpo", 130),
    Stage("decode-lora", 3, "gpu_stages.decode:with_adapter", 110, takes_turns=True),
    Stage("decode-qwen3-8b", 4, "gpu_stages.decode:qwen3_large", 130, takes_turns=True),
    Stage("learn-qwen3-0.6b", 4, "gpu_stages.learn:qwen3_small", 125, takes_turns=True),
    Stage("cuda-tests", 4, "gpu_stages.cuda_tests:cuda_tests", 120),
    Stage("grpo-overlap", 4, "gpu_stages.loop:grpo_overlap", 130),
    Stage("one-rank", 4, "gpu_stages.loop:one_rank", 90),
    Stage("decode-base", 4, "gpu_stages.decode:without_lora", 90, takes_turns=True),
    Stage("decode-dual-stream", 4, "gpu_stages.decode:dual_stream", 110, takes_turns=True),
    Stage("caches", 4, "gpu_stages.caches:caches", 40),
)


def chosen(names: list[str]) -> list[Stage]:
    """The named stages in the table's order; call1 to call4 and all name several.

    Raises:
        ValueError: an unknown name.
    """
    known = {stage.name for stage in STAGES} | {f"call{stage.call}" for stage in STAGES} | {"all"}
    for name in names:
        if name not in known:
            raise ValueError(f"no stage {name!r}; known: {', '.join(sorted(known))}")
    return [s for s in STAGES if {s.name, f"call{s.call}", "all"} & set(names)]
