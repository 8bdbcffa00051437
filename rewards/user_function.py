"""A user's own reward: `fn(completion, reference)`, or TRL's `fn(completions, **columns)`.

Its return values are checked. A failure raises a one-line error with the function's name, its input
and its output. Either form may be `async`; the calls of a batch then run concurrently.
"""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rewards.types import Reward, RewardError, Score

if TYPE_CHECKING:
    import asyncio

UserFunction = Callable[..., Any]
Row = Mapping[str, Any]  # a problem's columns, by name

_LARGEST = 1e18  # its square is still a float32


class FunctionReward(Reward):
    """A user's function, called in this process. A number of at least 1 counts as correct."""

    def __init__(self, name: str, function: UserFunction) -> None:
        """Raises ValueError if the function's arguments match neither form."""
        self.name, self._function = name, function
        parameters: Mapping[str, inspect.Parameter]
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # built-in without a signature
            parameters = {}
        self.is_batch = "completions" in parameters
        self._runner: asyncio.Runner | None = None
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._named = [p.name for p in parameters.values() if p.kind in _BY_NAME]
        self._needed = [
            p.name for p in parameters.values() if p.kind in _BY_NAME and p.default is p.empty
        ]
        if not self.is_batch and parameters:
            try:
                inspect.signature(function).bind("", "")
            except TypeError as error:
                raise ValueError(
                    f"reward {name!r} takes ({', '.join(parameters)}): write it as "
                    "fn(completion, reference), or as fn(completions, **columns) for a batch"
                ) from error

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        """One Score per completion. Raises RewardError as `score_rows` does."""
        return self.score_rows(completions, references, [{} for _ in completions])

    def score_rows(
        self, completions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
    ) -> list[Score]:
        """Like `score_batch`, with the columns of each completion's problem (TRL's form only).

        The columns are those of the data set, `reference` (the gold answer), `prompts` and
        `completion_ids`. As in TRL, completions are lists of messages if `prompts` are.

        Raises:
            RewardError: the function raises, asks for a missing column, or returns anything but
                finite numbers or Scores.
        """
        if not completions:
            return []
        got = [
            f"completion {_shown(completion)} and reference {_shown(reference)}"
            for completion, reference in zip(completions, references, strict=True)
        ]
        if self.is_batch:
            results = self._call_at_once(completions, references, rows)
        else:
            pairs = zip(got, completions, references, strict=True)
            results = self._awaited([self._call(*pair) for pair in pairs], got[0])
        return [self._score(result, text) for result, text in zip(results, got, strict=True)]

    def _call_at_once(
        self, completions: Sequence[str], references: Sequence[str], rows: Sequence[Row]
    ) -> Sequence[Any]:
        """The function's values for a batch, in TRL's form."""
        names = {name for row in rows for name in row} - {"prompt", "completion"}
        columns: dict[str, list[Any]] = {
            name: [row.get(name) for row in rows] for name in sorted(names)
        }
        columns["reference"] = list(references)
        prompts = columns.get("prompts", [])
        is_chat = bool(prompts) and all(isinstance(prompt, list) for prompt in prompts)
        columns["completions"] = [
            [{"role": "assistant", "content": text}] if is_chat else text for text in completions
        ]
        available = ", ".join(sorted(columns))
        got = (
            f"{len(completions)} completions, the first {_shown(completions[0])}, with {available}"
        )
        missing = [name for name in self._needed if name not in columns]
        if missing:
            raise RewardError(
                f"reward {self.name} asks for the column {missing[0]!r}; available: {available}"
            )
        arguments = {
            name: values
            for name, values in columns.items()
            if self._takes_all or name in self._named
        }
        (results,) = self._awaited([self._call(got, **arguments)], got)
        if hasattr(results, "tolist"):  # an array or a tensor
            results = results.tolist()
        if not isinstance(results, list | tuple):
            raise RewardError(
                f"reward {self.name} returned {_shown(results)} for {got}; "
                "a function of completions must return a list with one number each"
            )
        if len(results) != len(completions):
            raise RewardError(f"reward {self.name} returned {len(results)} rewards for {got}")
        return results

    def _call(self, got: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._function(*args, **kwargs)
        except Exception as error:
            raise self._failed(error, got) from error

    def _awaited(self, results: list[Any], got: str) -> list[Any]:
        """The results, with coroutines awaited."""
        coroutines = [result for result in results if inspect.iscoroutine(result)]
        if not coroutines:
            return results
        import asyncio  # lazy: slows every start of the command line

        async def gathered() -> list[Any]:
            # An exception becomes a result, so that no coroutine is left running.
            return await asyncio.gather(*coroutines, return_exceptions=True)

        # One loop for the reward's lifetime: clients cached by the user's function are tied to it.
        self._runner = self._runner or asyncio.Runner()
        done = self._runner.run(gathered())
        for result in done:
            if isinstance(result, Exception):
                raise self._failed(result, got) from result
        values = iter(done)
        return [next(values) if inspect.iscoroutine(result) else result for result in results]

    def _failed(self, error: Exception, got: str) -> RewardError:
        frames = traceback.extract_tb(error.__traceback__)
        frame = frames[-1] if frames else None
        where = "" if frame is None else f" ({frame.filename}, line {frame.lineno})"
        return RewardError(
            f"reward {self.name} raised {type(error).__name__}: "
            f"{_shown(str(error))[1:-1]}{where} for {got}"
        )

    def _score(self, result: Any, got: str) -> Score:
        score = result if isinstance(result, Score) else None
        value = _number(result if score is None else score.reward)
        if value is None:
            raise RewardError(
                f"reward {self.name} returned {_shown(result)} (of type {type(result).__name__}) "
                f"for {got}; it must return a number"
            )
        if not (math.isfinite(value) and abs(value) <= _LARGEST):
            raise RewardError(
                f"reward {self.name} returned {value:g} for {got}; "
                f"it must return a finite number of at most {_LARGEST:g}"
            )
        if score is not None and score.terms:
            raise RewardError(
                f"reward {self.name} returned a Score with terms for {got}; return the sum without "
                "them, or list a function for each in reward.terms"
            )
        return score or Score(value, value >= 1.0, "ok", answer=None, has_format=False)

    def close(self) -> None:
        """Close the event loop of async functions."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _number(value: Any) -> float | None:
    """The value of a real number, a numpy scalar or a 0-d tensor; None for anything else."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
