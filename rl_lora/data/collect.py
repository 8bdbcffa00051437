"""Collects the rows of all sources of a job and splits them into training and evaluation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rl_lora.config import DataSection, SourceSection
from rl_lora.data.references import alternatives
from rl_lora.data.row_formats import DataRow
from rl_lora.data.sources import LoadedSet, Role, has_eval_part, load_source, question_key
from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed

HELD_OUT = "held_out"  # in data.eval: rows held out from the training sources


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
    pool: list[Item] = []
    for source in data.train:
        rows = collected.add(source, "train", exclude=eval_keys)
        if has_held_out and has_eval_part(source):
            # num_rows applies to the training rows.
            pool += collected.read(source.model_copy(update={"num_rows": None}), "eval")
        elif has_held_out:
            pool += rows
    if pool:
        # A problem that is also in a named set is asked once.
        drawn = _held_out(pool, data.held_out, seed)
        collected.eval = [*(i for i in drawn if i.key not in eval_keys), *collected.eval]
    collected.drop_overlap()
    return collected


class Collected:
    """Items of all sources so far, and counts for the notes."""

    def __init__(self) -> None:
        self.train: list[Item] = []
        self.eval: list[Item] = []
        self._accounts: list[tuple[str, LoadedSet, list[Item]]] = []
        self._prefixes: Counter[str] = Counter()
        self._seen: set[str] = set()  # questions of the training sources

    def add(self, source: SourceSection, role: Role, exclude: Collection[str] = ()) -> list[Item]:
        """Adds a source's rows to the training or evaluation rows and returns them."""
        items = self.read(source, role, exclude)
        (self.train if role == "train" else self.eval).extend(items)
        return items

    def read(self, source: SourceSection, role: Role, exclude: Collection[str] = ()) -> list[Item]:
        """Items with unique ids, without training questions of an earlier set."""
        loaded = load_source(source, role, exclude)
        label = loaded.label
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


def _held_out(pool: list[Item], num_rows: int, seed: int) -> list[Item]:
    if len(pool) <= num_rows:
        fix = "lower it, or set data.eval" if len(pool) > 1 else "set data.eval"
        raise UserError(
            f"data.held_out={num_rows} leaves none of the {len(pool)} rows for training; {fix}"
        )
    drawn = random.Random(mix_seed("held_out", seed)).sample(range(len(pool)), num_rows)
    unique = {pool[index].full_key: pool[index] for index in sorted(drawn)}
    return list(unique.values())
