"""Rewards by name: a table of built-in ones, or a user's own function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path

from rewards.extraction.thinking import ExtraTags, check_tags
from rewards.grading import FormatReward, Grader
from rewards.rules import load_rules
from rewards.types import Reward
from rewards.user_function import FunctionReward, UserFunction

# Name -> the engine that decides what the fast tiers leave open; None: no answer is verified.
REWARDS: dict[str, str | None] = {"math": "verify", "math_verify": "math_verify", "format": None}


def load_reward(
    name: str,
    *,
    format_weight: float = 0.0,
    num_workers: int = 1,
    timeout_s: float = 5.0,
    rules: str = "default",
    thinking_tags: ExtraTags = (),
) -> Reward:
    """The reward called `name`: a key of REWARDS, or a user's own function as "module:function".

    `thinking_tags` are (opening, closing) pairs in addition to `thinking.TAGS`; text between them
    is not graded. A user's function sees the whole completion.

    Raises ValueError for an unknown name, module, function or rules (with the closest known name),
    for a function with the wrong arguments, for invalid tags, and for "math_verify" if Math-Verify
    is not installed.
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
    if name == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "reward 'math_verify' needs the optional package: pip install 'rl-lora[math-verify]'"
        )
    engine = REWARDS[name]
    if engine is None:
        return FormatReward(thinking_tags)
    grader = Grader(
        known,
        engine=engine,
        num_workers=num_workers,
        timeout_s=timeout_s,
        thinking_tags=thinking_tags,
        format_weight=format_weight,
    )
    grader.pool.start()
    return grader


def import_function(name: str, what: str = "reward") -> UserFunction:
    """Import "module:function"; the module may be in the working directory.

    Args:
        name: "module:function".
        what: what it is used for, for error messages.

    Raises:
        ValueError: there is no such module or function; names the closest one.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"{what} {name!r} is not of the form 'module:function'")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: it hides nothing
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A failed import inside the user's module propagates: the user needs its traceback.
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
