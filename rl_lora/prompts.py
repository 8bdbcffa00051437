"""Data sets -> prompts, rendered and tokenised once; and the seeded, resumable stream of them.

The evaluation and the training rows share no question. What was dropped on the way is told in one
line a data set (`PromptSets.notes`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_lora.config import DataSection, SourceSection, parse_as
from rl_lora.data.chat_template import (
    ChatTemplate,
    check_characters,
    check_plain,
    encode_prompts,
    markup_note,
)
from rl_lora.data.chats import finish_solution
from rl_lora.data.messages import Message, plain_text, read_tools, with_question
from rl_lora.data.references import alternatives
from rl_lora.data.row_formats import DataRow
from rl_lora.data.sources import LoadedSet, Role, has_eval_part, load_source, question_key
from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed
from rl_lora.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT = "held_out"  # in data.eval: rows kept from the training sources


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The problems to train on and the evaluation.

    Example: PromptSets(train=[Prompt(...)], eval=[Prompt(...)], notes=["gsm8k: 7473 of 7473 ..."])
    """

    train: list[Prompt]
    eval: list[Prompt]
    notes: list[str]  # one line a data set: rows kept, and why the others were dropped


@dataclass(frozen=True, slots=True)
class _Item:
    """A row with the names that its prompt will carry."""

    prompt_id: str
    label: str
    row: DataRow
    key: str  # of what is asked, whatever the system message
    full_key: str  # the system message with it


def load_prompt_sets(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    max_new_tokens: int,
    seed: int,
    *,
    max_eval_tokens: int | None = None,
    with_columns: bool = False,
) -> PromptSets:
    """Loads, cleans, splits and renders all data sets of a job.

    Without data.eval, `data.held_out` rows make the evaluation: drawn by seed from the test parts
    of the training sources that have one, and from the training rows of the others. With a source
    named "held_out" in data.eval they come beside the other sets.

    Args:
        data: the sources and how their questions are rendered.
        tokenizer: the base model's.
        context_length: positions that the model takes, prompt and completion together.
        max_new_tokens: cap of a completion; the prompt must leave room for it.
        seed: of the rows held out.
        max_eval_tokens: cap of a completion in the evaluation; None: max_new_tokens.
        with_columns: keep the rows' columns in the prompts, for a reward that takes them.

    Raises:
        UserError: a source that cannot be used, too few rows, a chat template that is not there or
            does not take a row, half a character, or a prompt that is too long. Prompts are never
            cut.
    """
    if not data.train and not data.eval:
        raise UserError("data.train and data.eval name no data set; set data.train, e.g. gsm8k")
    renderer = _Renderer(data, tokenizer, with_columns=with_columns)
    collected = _Collected()
    named = [source for source in data.eval if source.name != HELD_OUT]
    has_held_out = len(named) < len(data.eval) or not data.eval
    if has_held_out and not data.train:
        raise UserError("data.eval has 'held_out', but data.train has no rows to keep; set it")
    for source in named:
        collected.add(source, "eval")
    eval_keys = {item.key for item in collected.eval}
    pool: list[_Item] = []
    for source in data.train:
        collected.add(source, "train", exclude=eval_keys)
        if has_held_out and has_eval_part(source):
            # num_rows is of the training rows.
            pool += collected.read(source.model_copy(update={"num_rows": None}), "eval")
        elif has_held_out:
            pool += collected.last
    if pool:
        # A problem of a named set that is drawn again is asked once.
        drawn = _held_out(pool, data.held_out, seed)
        collected.eval = [*(i for i in drawn if i.key not in eval_keys), *collected.eval]
    collected.drop_overlap()
    eval_tokens = max_eval_tokens or max_new_tokens
    asked = [item.row.asked(with_system=True) for item in (*collected.train, *collected.eval)]
    markup = markup_note(asked, tokenizer) if data.template == "chat" else None
    return PromptSets(
        train=renderer.prompts(collected.train, context_length - max_new_tokens),
        eval=renderer.prompts(collected.eval, context_length - eval_tokens),
        notes=[*collected.notes(), *([markup] if markup else [])],
    )


def load_prompts(
    source: str | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: Role = "train",
    seed: int = 0,
    **settings: Any,
) -> PromptStream:
    """All problems of one data set, as a shuffled stream: `take` gives the next ones.

    Args:
        source: a data set's name, a file, a folder or a generator, as in `data.train`; or a dict
            of one's settings, e.g. {"name": "gsm8k", "num_rows": 100}.
        tokenizer: of the base model; its chat template renders the problems.
        role: "train" or "eval": which part of the data set, where it has both.
        seed: of the order.
        settings: further keys of [data], e.g. template="base", instruction="" or system="...".

    Raises:
        UserError: a bad setting, a data set that cannot be used, or a prompt that is too long.
    """
    data = parse_as(DataSection, {role: source, **settings})
    renderer, collected = _Renderer(data, tokenizer), _Collected()
    for section in data.train or data.eval:
        collected.add(section, role)
    items = [*collected.train, *collected.eval]
    return PromptStream(renderer.prompts(items, data.max_prompt_tokens), seed)


class _Collected:
    """Items of all sources so far, with the account of each."""

    def __init__(self) -> None:
        self.train: list[_Item] = []
        self.eval: list[_Item] = []
        self.last: list[_Item] = []  # of the source added last
        self._accounts: list[tuple[str, LoadedSet, list[_Item]]] = []
        self._prefixes: Counter[str] = Counter()
        self._seen: set[str] = set()  # questions of the training sources

    def add(
        self, source: SourceSection, role: Role, exclude: set[str] | frozenset[str] = frozenset()
    ) -> None:
        self.last = self.read(source, role, exclude)
        (self.train if role == "train" else self.eval).extend(self.last)

    def read(
        self, source: SourceSection, role: Role, exclude: set[str] | frozenset[str] = frozenset()
    ) -> list[_Item]:
        """Items with ids of their own; training questions that an earlier set has are left out."""
        loaded = load_source(source, role, exclude)
        label = loaded.label
        base = label if role == "train" else f"{label}-eval"
        self._prefixes[base] += 1
        prefix = base if self._prefixes[base] == 1 else f"{base}.{self._prefixes[base]}"
        items = []
        for row in loaded.rows:
            key, full_key = (question_key(row.asked(with_system=one)) for one in (False, True))
            item = _Item(f"{prefix}/{row.row}", label, row, key, full_key)
            if role == "train" and item.full_key in self._seen:
                loaded.dropped["in an earlier set"] = loaded.dropped.get("in an earlier set", 0) + 1
            else:
                items.append(item)
                if role == "train":
                    self._seen.add(item.full_key)
        self._accounts.append((role, loaded, items))
        return items

    def drop_overlap(self) -> None:
        """Training rows whose question is in the evaluation go."""
        eval_keys = {item.key for item in self.eval}
        eval_ids = {item.prompt_id for item in self.eval}
        num_before = len(self.train)
        kept = [item for item in self.train if item.key not in eval_keys]
        if num_before and not kept:
            raise UserError(
                "no training row is left: the evaluation has all of their questions; give "
                "data.eval another set, or lower data.held_out or the evaluation's num_rows"
            )
        self.train = kept
        for role, loaded, items in self._accounts:
            shared = [item for item in items if item.key in eval_keys]
            held_out = sum(item.prompt_id in eval_ids for item in shared)
            if role == "train" and held_out:
                loaded.dropped["held out for the evaluation"] = held_out
            if role == "train" and len(shared) > held_out:
                loaded.dropped["also in the evaluation"] = len(shared) - held_out

    def notes(self) -> list[str]:
        train_ids = {item.prompt_id for item in self.train}
        eval_ids = {item.prompt_id for item in self.eval}
        lines = []
        for role, loaded, items in self._accounts:
            ids = train_ids if role == "train" else eval_ids
            num_kept = sum(item.prompt_id in ids for item in items)
            reasons = dict(loaded.dropped)
            if role == "eval" and num_kept < len(items):
                reasons["not drawn (data.held_out)"] = len(items) - num_kept
            why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            num_lists = sum(len(alternatives(item.row.reference or "")) > 1 for item in items)
            lines.append(
                f"{loaded.label} ({role}): {num_kept} of {loaded.num_read} rows"
                + (f"; dropped: {why}" if why else "")
                + (f"; {num_lists} with several answers, any of which counts" if num_lists else "")
            )
        return lines


def _held_out(pool: list[_Item], num_rows: int, seed: int) -> list[_Item]:
    if len(pool) <= num_rows:
        raise UserError(
            f"data.held_out={num_rows} leaves nothing of the {len(pool)} rows there are; lower it, "
            "or give data.eval"
        )
    drawn = random.Random(mix_seed("held_out", seed)).sample(range(len(pool)), num_rows)
    unique = {pool[index].full_key: pool[index] for index in sorted(drawn)}
    return list(unique.values())


# --- rendering ------------------------------------------------------------------------------------


class _Renderer:
    """Rows -> prompts, by the settings of one job."""

    def __init__(
        self, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, with_columns: bool = False
    ) -> None:
        """Raises UserError for settings of the other template, or no chat template."""
        is_chat = data.template == "chat"
        self._data, self._tokenizer, self._with_columns = data, tokenizer, with_columns
        self._chat = ChatTemplate(tokenizer, data.chat_template_kwargs) if is_chat else None
        if not is_chat and data.system is not None:
            raise UserError("data.system needs data.template='chat'; put the text in data.few_shot")
        if not is_chat and data.chat_template_kwargs:
            raise UserError("data.chat_template_kwargs needs data.template='chat'; leave it out")
        if is_chat and data.few_shot:
            raise UserError("data.few_shot needs data.template='base'; put the text in data.system")

    def text(self, row: DataRow, who: str) -> str:
        """The prompt as text."""
        data = self._data
        asked = f"{row.question}\n{data.instruction}" if data.instruction else row.question
        messages = with_question(row.messages, asked)
        if self._chat is None:
            check_plain(messages, who)
            return data.few_shot + plain_text(messages)
        if data.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", data.system))
        return self._chat.render(
            messages, who, opens_turn=True, tools=read_tools(row.columns.get("tools"))
        )

    def prompts(self, items: Sequence[_Item], limit: int) -> list[Prompt]:
        """One prompt an item, each of at most `limit` tokens."""
        if not items:
            return []
        texts = [self.text(item.row, f"prompt {item.prompt_id}") for item in items]
        for item, text in zip(items, texts, strict=True):
            for part in (text, item.row.reference or "", item.row.solution):
                check_characters(part, f"prompt {item.prompt_id}")
        ids = encode_prompts(texts, self._tokenizer, with_start=self._chat is None)
        _check_lengths(items, [len(one) for one in ids], self._data.max_prompt_tokens, limit)
        instruction = self._data.instruction
        prompts = []
        for item, token_ids in zip(items, ids, strict=True):
            row = item.row
            assert row.reference is not None  # `loaders` dropped the others
            prompts.append(
                Prompt(
                    prompt_id=item.prompt_id,
                    source=item.label,
                    question=row.question,
                    reference=row.reference,
                    token_ids=tuple(token_ids),
                    solution=finish_solution(row.solution, row.reference, instruction),
                    columns=row.columns if self._with_columns else {},
                )
            )
        return prompts


def render_text(question: str, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as text: chat markup with the turn opened, or few-shot text and question."""
    return _Renderer(data, tokenizer).text(DataRow(question, None), "the prompt")


def _check_lengths(
    items: Sequence[_Item], num_tokens_N: Sequence[int], max_prompt_tokens: int, limit: int
) -> None:
    """Raises UserError for the longest prompt, if it is too long."""
    longest = max(range(len(items)), key=lambda index: num_tokens_N[index])
    num_tokens = num_tokens_N[longest]
    if num_tokens <= min(max_prompt_tokens, limit):
        return
    num_over = sum(number > min(max_prompt_tokens, limit) for number in num_tokens_N)
    who = f"prompt {items[longest].prompt_id} has {num_tokens} tokens"
    if num_over > 1:
        who += f" (and {num_over - 1} more are too long)"
    if num_tokens > limit:
        raise UserError(
            f"{who}: the model's context leaves {limit} beside sampling.max_tokens (in the "
            "evaluation eval.max_tokens); lower that, or take the row out of the data"
        )
    raise UserError(
        f"{who}, over data.max_prompt_tokens={max_prompt_tokens}; raise it, or take the row out of "
        "the data"
    )


# --- the stream -----------------------------------------------------------------------------------


class PromptStream:
    """Prompts without end: every epoch shuffles anew by seed, and a take never repeats a prompt.

    (A take of more prompts than there are must repeat; each full round of it is distinct.)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise UserError("there is no prompt to train on; set data.train")
        self._prompts = list(prompts)
        self._seed = seed
        self._epoch = 0
        self._position = 0  # in the epoch's order
        # Rows of this epoch that a take over its start had to skip, as it had them already.
        self._owed: list[int] = []
        self._order = self._shuffled()

    @property
    def prompts_N(self) -> list[Prompt]:
        """All of them, in the data set's order."""
        return list(self._prompts)

    @property
    def epoch(self) -> int:
        """Full passes over the prompts so far."""
        return self._epoch

    def take(self, num_prompts: int) -> list[Prompt]:
        """The next prompts, over the end of an epoch if need be."""
        taken: list[Prompt] = []
        seen: set[int] = set()
        while len(taken) < num_prompts:
            if len(seen) == len(self._prompts):
                seen = set()
            index = self._next(seen)
            seen.add(index)
            taken.append(self._prompts[index])
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, for a checkpoint."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "owed": list(self._owed),
            "seed": self._seed,
            "num_prompts": len(self._prompts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on exactly where `state_dict` was taken.

        Raises:
            UserError: the checkpoint is of another seed or another number of prompts.
        """
        for key, now in (("seed", self._seed), ("num_prompts", len(self._prompts))):
            if state[key] != now:
                raise UserError(
                    f"the checkpoint's prompt stream has {key}={state[key]}, this job {now}; "
                    "resume with the run's own data settings"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._owed = list(state["owed"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(mix_seed("epoch", self._seed, self._epoch)).shuffle(order)
        return order

    def _next(self, seen: set[int]) -> int:
        for place, index in enumerate(self._owed):
            if index not in seen:
                return self._owed.pop(place)
        while True:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled()
            index = self._order[self._position]
            self._position += 1
            if index not in seen:
                return index
            self._owed.append(index)
