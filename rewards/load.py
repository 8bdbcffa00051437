"""Rewards by name: the literal table, and a user's own function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rewards.extraction.thinking import ExtraTags, check_tags
from rewards.grading import Grader
from rewards.rules import load_rules
from rewards.types import Reward, Score
from rewards.user_function import FunctionReward, UserFunction


class VerifierReward:
    """Reward 1.0 for a right answer, plus `format_weight` for a balanced ``\\boxed{}``."""

    def __init__(self, grader: Grader, format_weight: float) -> None:
        self._grader = grader
        self._format_weight = format_weight

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        return self._grader.score_batch(completions, references, format_weight=self._format_weight)

    def close(self) -> None:
        self._grader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# Name -> the engine that decides what the fast tiers could not.
REWARDS: dict[str, str] = {"math": "verify", "math_verify": "math_verify"}


def load_reward(
    name: str,
    *,
    format_weight: float = 0.0,
    num_workers: int = 1,
    timeout_s: float = 5.0,
    rules: str = "default",
    thinking_tags: ExtraTags = (),
) -> Reward:
    """The reward called `name`: a row of REWARDS, or "module:function" of the user's own.

    `thinking_tags`: (opening, closing) pairs around what is no answer, beyond `thinking.TAGS`; a
    user's function sees the whole completion.

    Raises ValueError for an unknown name, module, function or rules, naming the nearest one, for a
    function of other arguments, for tags that are none, and for "math_verify" where Math-Verify is
    not installed.
    """
    known = load_rules(rules)
    check_tags(thinking_tags)
    if ":" in name:
        return FunctionReward(name, import_function(name))
    if name not in REWARDS:
        near = difflib.get_close_matches(name, REWARDS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown reward {name!r}: did you mean {near[0]!r}? Known: {', '.join(REWARDS)}, "
            "or your own as 'module:function'"
        )
    if name == "math_verify":
        _require_math_verify()
    grader = Grader(
        known,
        engine=REWARDS[name],
        num_workers=num_workers,
        timeout_s=timeout_s,
        thinking_tags=thinking_tags,
    )
    grader.pool.start()
    return VerifierReward(grader, format_weight)


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "reward 'math_verify' needs the optional package: pip install 'rl-lora[math-verify]'"
        )


def import_function(name: str, what: str = "reward") -> UserFunction:
    """The function of "module:function"; the module may be in the working directory.

    Args:
        name: "module:function".
        what: what it is used as, for the messages.

    Raises:
        ValueError: no such module or function, naming the nearest one.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{what} {name!r} is not of the form 'module:function'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: it hides nothing
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's to see in full.
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise ValueError(
            f"{what} {name!r}: no module {error.name!r}; run in its folder, or put that on "
            "PYTHONPATH"
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, dir(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{what} {name!r}: module {module_name!r} has no function {function_name!r}{hint}"
        )
    checked: UserFunction = function
    return checked
