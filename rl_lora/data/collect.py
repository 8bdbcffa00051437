"""Collects the rows of all sources of a job and splits them into training and evaluation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rl_lora.config import HELD_OUT, DataSection, SourceSection
from rl_lora.data.references import alternatives
from rl_lora.data.row_formats import DataRow
from rl_lora.data.sources import LoadedSet, Role, has_eval_part, load_source, question_key
from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed


@dataclass(frozen=True, slots=True)
class Item:
    """A row with the names for its prompt."""

    prompt_id: str
    label: str
    row: DataRow
    key: str  # `question_key` without the system message
    full_key: str  # `question_key` with it


def collect(data: DataSection, seed: int) -> Collected:
    """The rows of all sources, split into training and evaluation.

    Raises:
        UserError: an unusable source, or too few rows.
    """
    collected = Collected()
    named = [source for source in data.eval if source.name != HELD_OUT]
    has_held_out = len(named) < len(data.eval) or not data.eval
    if has_held_out and not data.train:
        raise UserError("data.eval has 'held_out', but data.train is empty; set data.train")
    for source in named:
        collected.add(source, "eval")
    eval_keys = {item.key for item in collected.eval}
    pools: list[list[Item]] = []  # by training source, what its held-out rows are drawn from
    for source in data.train:
        rows = collected.add(source, "train", exclude=eval_keys)
        if has_held_out and has_eval_part(source):
            # num_rows applies to the training rows.
            rows = collected.read(source.model_copy(update={"num_rows": None}), "eval")
        pools.append(rows)
    if has_held_out:
        # A problem that is also in a named set is asked once.
        drawn = _held_out(pools, data, seed)
        collected.eval = [*(i for i in drawn if i.key not in eval_keys), *collected.eval]
    collected.drop_overlap()
    collected.weights = _weights(data.train, collected)
    return collected


def _weights(sources: Sequence[SourceSection], collected: Collected) -> dict[str, float]:
    """The weights of the training sources by label; empty if none has one.

    Raises:
        UserError: two sources have one label.
    """
    if len(sources) < 2 or all(source.weight is None for source in sources):
        return {}
    weights: dict[str, float] = {}
    for source, label in zip(sources, collected.train_labels, strict=True):
        if label in weights:
            raise UserError(
                f"two sets of data.train are called {label!r}, and weights are by name; give each "
                'its own label, e.g. label = "easy"'
            )
        weights[label] = 1.0 if source.weight is None else source.weight
    return weights


class Collected:
    """Items of all sources so far, and counts for the notes."""

    def __init__(self) -> None:
        self.train: list[Item] = []
        self.eval: list[Item] = []
        self.weights: dict[str, float] = {}  # of the training sources by label; empty: none
        self._accounts: list[tuple[str, LoadedSet, list[Item]]] = []
        self._prefixes: Counter[str] = Counter()
        self._seen: set[str] = set()  # questions of the training sources

    @property
    def train_labels(self) -> list[str]:
        """Of the training sources, in their order."""
        return [loaded.label for role, loaded, _ in self._accounts if role == "train"]

    def add(self, source: SourceSection, role: Role, exclude: Collection[str] = ()) -> list[Item]:
        """Adds a source's rows to the training or evaluation rows and returns them."""
        items = self.read(source, role, exclude)
        (self.train if role == "train" else self.eval).extend(items)
        return items

    def read(self, source: SourceSection, role: Role, exclude: Collection[str] = ()) -> list[Item]:
        """Items with unique ids, without training questions of an earlier set."""
        loaded = load_source(source, role, exclude)
        label = loaded.label = source.label or loaded.label
        base = label if role == "train" else f"{label}-eval"
        self._prefixes[base] += 1
        prefix = base if self._prefixes[base] == 1 else f"{base}.{self._prefixes[base]}"
        items = []
        for row in loaded.rows:
            key, full_key = (question_key(row.asked(with_system=one)) for one in (False, True))
            if role == "train" and full_key in self._seen:
                loaded.dropped["in an earlier set"] += 1
            else:
                items.append(Item(f"{prefix}/{row.row}", label, row, key, full_key))
        if role == "train":
            self._seen |= {item.full_key for item in items}
        self._accounts.append((role, loaded, items))
        return items

    def drop_overlap(self) -> None:
        """Removes training rows whose question is in the evaluation."""
        eval_keys = {item.key for item in self.eval}
        eval_ids = {item.prompt_id for item in self.eval}
        kept = [item for item in self.train if item.key not in eval_keys]
        if self.train and not kept:
            raise UserError(
                "no training row is left, as the evaluation has all of their questions; set "
                "another data.eval, or lower data.held_out or the evaluation's num_rows"
            )
        self.train = kept
        for role, loaded, items in self._accounts:
            for item in items if role == "train" else ():
                if item.key in eval_keys:
                    is_held_out = item.prompt_id in eval_ids
                    why = "held out for" if is_held_out else "also in"
                    loaded.dropped[f"{why} the evaluation"] += 1

    def notes(self) -> list[str]:
        ids = {
            "train": {item.prompt_id for item in self.train},
            "eval": {item.prompt_id for item in self.eval},
        }
        lines = []
        for role, loaded, items in self._accounts:
            num_kept = sum(item.prompt_id in ids[role] for item in items)
            reasons = [f"{count} {reason}" for reason, count in loaded.dropped.items()]
            if role == "eval" and num_kept < len(items):
                reasons.append(f"{len(items) - num_kept} not drawn (data.held_out)")
            why = ", ".join(reasons)
            num_lists = sum(len(alternatives(item.row.reference or "")) > 1 for item in items)
            lines.append(
                f"{loaded.label} ({role}): {num_kept} of {loaded.num_read} rows"
                + (f"; dropped: {why}" if why else "")
                + (f"; {num_lists} with several answers, any of which counts" if num_lists else "")
            )
        return lines


def _held_out(pools: list[list[Item]], data: DataSection, seed: int) -> list[Item]:
    """The rows that are held out of the training sources, drawn by seed, one per question: of each
    source where one has a weight or a number of held-out rows, and otherwise of all together."""
    numbers = [data.held_out]
    if any(source.weight is not None or source.held_out is not None for source in data.train):
        numbers = _num_held_out(pools, data)
    else:
        pools = [[item for pool in pools for item in pool]]
        _check_held_out(data.held_out, [len(pools[0])])
    drawn = []
    for number, (pool, num_rows) in enumerate(zip(pools, numbers, strict=True)):
        parts = [number] if len(pools) > 1 else []
        rng = random.Random(mix_seed("held_out", seed, *parts))
        drawn += [pool[index] for index in sorted(rng.sample(range(len(pool)), num_rows))]
    return list({item.full_key: item for item in drawn}.values())


def _num_held_out(pools: list[list[Item]], data: DataSection) -> list[int]:
    """By training source: its own number, or else its part of data.held_out, in proportion to its
    rows (by largest remainders, leaving each source a row)."""
    numbers = [source.held_out for source in data.train]
    for source, pool in zip(data.train, pools, strict=True):
        if source.held_out and source.held_out >= len(pool):
            raise UserError(
                f"held_out={source.held_out} of {source.name} leaves none of its {len(pool)} rows "
                "for training; lower it"
            )
    sharing = [index for index, number in enumerate(numbers) if number is None]
    sizes = [len(pools[index]) for index in sharing]
    num_shared = data.held_out if sharing else 0
    _check_held_out(num_shared, sizes)
    for index, number in zip(sharing, apportioned(num_shared, sizes), strict=True):
        numbers[index] = number
    found = [number or 0 for number in numbers]
    if not any(found):
        raise UserError("every training set has held_out=0; raise one, or set data.eval")
    return found


def _check_held_out(num_rows: int, sizes: Sequence[int]) -> None:
    """Raises UserError if so many rows leave none of a source's for training."""
    if sum(max(size - 1, 0) for size in sizes) < num_rows:
        num = sum(sizes)
        fix = "lower it, or set data.eval" if num > len(sizes) else "set data.eval"
        raise UserError(
            f"data.held_out={num_rows} leaves none of the {num} rows for training; {fix}"
        )


def apportioned(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to the sizes, in whole numbers by largest remainders; each part stays
    below its size. Example: apportioned(10, [60, 25, 15]) == [6, 3, 1]."""
    parts = [total * size // sum(sizes) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % sum(sizes)))
    while sum(parts) < total:
        for index in order:
            if sum(parts) < total and parts[index] < sizes[index] - 1:
                parts[index] += 1
    return parts
