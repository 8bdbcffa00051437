"""Supervised data sets -> tokenized training and test sequences, and the rows of each step.

Each assistant message to be learned makes one sequence: everything before it is the prompt; the
completion is what the chat template writes for the message, up to the token that ends its turn (if
the template has none, the tokenizer's end token follows). Only the completion counts for the loss.
"""

from __future__ import annotations

import json
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora.config import SourceSection
from rl_lora.config.sft import SftDataSection
from rl_lora.data.chat_template import ChatTemplate, check_characters, check_plain, encode_prompts
from rl_lora.data.chats import Chat, parse_chats, problem_chat
from rl_lora.data.files import Role, folder_files, label_of, read_file
from rl_lora.data.generators import generated_rows
from rl_lora.data.messages import Message, conversation_text
from rl_lora.data.sources import DEFAULT_ROWS, HubSet, is_hub_id, load_hub, unknown_set
from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed
from rl_lora.types import TrainSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SFT_SETS: dict[str, HubSet] = {
    "tulu3": HubSet("allenai/tulu-3-sft-mixture", "train", None),
    "openthoughts3": HubSet("open-thoughts/OpenThoughts3-1.2M", "train", None),
}


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenized sequence; arrays have 4 bytes per token, as a data set may have millions.

    Example: Tokens(prompt_ids=array("i", [1, 5]), completion_ids=array("i", [7, 2]))
    """

    prompt_ids: array[int]
    completion_ids: array[int]

    def sample(self) -> TrainSample:
        """As the learner's input; log-probs and advantage are placeholders of a supervised loss."""
        return TrainSample(
            prompt_ids=tuple(self.prompt_ids),
            completion_ids=tuple(self.completion_ids),
            sampler_logprobs_T=(0.0,) * len(self.completion_ids),
            advantage=1.0,
            adapter_version=0,
        )


@dataclass(frozen=True, slots=True)
class SftSets:
    """Training and test sequences, and notes on rows left out, one per data set."""

    train: list[Tokens]
    test: list[Tokens]
    notes: list[str]

    @property
    def num_train_tokens(self) -> int:
        """Completion tokens of the training rows, each counted once."""
        return sum(len(sequence.completion_ids) for sequence in self.train)


def load_sft(
    data: SftDataSection, tokenizer: PreTrainedTokenizerBase, context_length: int, seed: int
) -> SftSets:
    """Reads, splits and tokenizes all data sets of a job.

    Without data.eval, `data.held_out` rows of the training sets, drawn by seed, are held out for
    the test. Training rows whose chat is also in the test are left out.

    Raises:
        UserError: an unusable source, too few rows, no chat template, or no sequence that fits
            data.max_tokens.
    """
    if not data.train:
        raise UserError("data.train is empty; set it to a data set, e.g. a .jsonl file of chats")
    renderer = _Renderer(data, tokenizer)
    notes: list[str] = []
    max_tokens = min(data.max_tokens, context_length)
    train = [one for s in data.train for one in _load(s, "train", data, notes)]
    if data.eval:
        test = [one for s in data.eval for one in _load(s, "eval", data, notes)]
    else:
        if len(train) <= data.held_out:
            raise UserError(
                f"data.held_out={data.held_out} leaves none of the {len(train)} rows to train on; "
                "lower it, or set data.eval"
            )
        drawn = set(random.Random(mix_seed("sft", seed)).sample(range(len(train)), data.held_out))
        test = [chat for place, chat in enumerate(train) if place in drawn]
        train = [chat for place, chat in enumerate(train) if place not in drawn]
    tested = {(chat.messages, chat.tools) for chat in test}
    kept = [chat for chat in train if (chat.messages, chat.tools) not in tested]
    if len(kept) < len(train):
        notes.append(f"{len(train) - len(kept)} training rows left out: they are also in the test")
    sets = SftSets(
        renderer.tokens(kept, max_tokens, "training", notes),
        renderer.tokens(test, max_tokens, "test", notes),
        notes,
    )
    for name, sequences in (("training", sets.train), ("test", sets.test)):
        if not sequences:
            raise UserError(
                f"no {name} sequence is left: every prompt takes up data.max_tokens={max_tokens}; "
                "raise it, or use other data"
            )
    return sets


def step_indices(step: int, batch_size: int, num_rows: int, seed: int) -> list[int]:
    """Row indices of a step (from 1); each epoch has its own order, and a batch may span two.

    A pure function of the step, so a resumed run needs no other state.
    """
    first = (step - 1) * batch_size
    orders: dict[int, list[int]] = {}
    indices = []
    for place in range(first, first + batch_size):
        epoch, index = divmod(place, num_rows)
        if epoch not in orders:
            orders[epoch] = list(range(num_rows))
            random.Random(mix_seed("sft epoch", seed, epoch)).shuffle(orders[epoch])
        indices.append(orders[epoch][index])
    return indices


# --- reading --------------------------------------------------------------------------------------


def _load(source: SourceSection, role: Role, data: SftDataSection, notes: list[str]) -> list[Chat]:
    label, chats = _read(source, role, data)
    usable = [chat for chat in chats if chat.answers]
    note = f"{label} ({role}): {len(usable)} of {len(chats)} rows"
    if len(usable) < len(chats):
        note += f"; dropped: {len(chats) - len(usable)} with nothing to learn"
    notes.append(note)
    if not usable:
        raise UserError(f"data set {source.name}: none of its {len(chats)} rows has an answer")
    return usable


def _read(source: SourceSection, role: Role, data: SftDataSection) -> tuple[str, list[Chat]]:
    """(label, rows) of a generator, a file or folder, or the hub; num_rows drawn by source.seed."""
    kind, separator, name = source.name.partition(":")
    if separator and kind == "generated":
        wanted = source.num_rows or DEFAULT_ROWS
        rows = islice(generated_rows(name, source.options, source.seed), wanted)
        return name, [problem_chat(row, data.instruction) for row in rows]
    if source.options:
        raise UserError(f"data set {source.name} is not generated: options do not apply")
    columns = (source.question, source.answer)
    path = Path(source.name).expanduser()
    if path.exists():
        files = folder_files(path, role, source.split) if path.is_dir() else [path]
        chats = [
            chat
            for file in files
            for chat in parse_chats(read_file(file), str(file), data.instruction, *columns)
        ]
        return label_of(path), _draw(chats, source)
    if source.name not in SFT_SETS and not is_hub_id(source.name):
        raise UserError(unknown_set(source.name))
    known = SFT_SETS.get(source.name, HubSet(source.name, "train", "test"))
    split = source.split or (known.train if role == "train" else known.eval)
    if split is None:
        raise UserError(
            f"data set {source.name} has no test split; leave data.eval empty and set data.held_out"
        )
    loaded = load_hub(source.name, known, None, split)
    if source.num_rows is not None and source.num_rows < len(loaded):
        # Mixtures are ordered by source: the first rows are not a representative sample.
        loaded = loaded.shuffle(seed=source.seed).select(range(source.num_rows))
    label = source.name.rpartition("/")[2]
    return label, parse_chats(loaded, f"data set {source.name}", data.instruction, *columns)


def _draw(chats: list[Chat], source: SourceSection) -> list[Chat]:
    if source.num_rows is None or source.num_rows >= len(chats):
        return chats
    rng = random.Random(mix_seed("sft rows", source.seed))
    return [chats[place] for place in sorted(rng.sample(range(len(chats)), source.num_rows))]


# --- rendering ------------------------------------------------------------------------------------


class _Renderer:
    """Chats -> token ids with one job's settings."""

    def __init__(self, data: SftDataSection, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UserError without a chat template, or for settings of an unused one."""
        is_chat = data.template == "chat"
        self._data, self._tokenizer = data, tokenizer
        self._chat = ChatTemplate(tokenizer, data.chat_template_kwargs) if is_chat else None
        if not is_chat and data.chat_template_kwargs:
            raise UserError("data.chat_template_kwargs needs data.template='chat'; remove it")
        end = self._chat.turn_end if self._chat else None
        self._end_ids = {int(tokenizer.eos_token_id)} | ({end.token_id} if end else set())

    def tokens(
        self, chats: Sequence[Chat], max_tokens: int, what: str, notes: list[str]
    ) -> list[Tokens]:
        """One sequence per answer, cut at max_tokens; a note counts those cut or left out."""
        counts: Counter[str] = Counter()
        sequences: list[Tokens] = []
        for start in range(0, len(chats), 1000):  # batches are fast; all at once take much memory
            for prompt, answer in self._encode(list(self._pairs(chats[start : start + 1000]))):
                room = max_tokens - len(prompt)
                if room < 1:
                    counts["dropped, prompt too long"] += 1
                    continue
                if len(answer) > room:
                    counts["cut at data.max_tokens"] += 1
                sequences.append(Tokens(array("i", prompt), array("i", answer[:room])))
        if counts:
            text = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
            notes.append(f"{what}: {len(sequences)} sequences of up to {max_tokens} tokens; {text}")
        return sequences

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = self._data.system
        has_own = system is None or messages[0].role == "system"
        return list(messages) if has_own else [Message("system", system), *messages]

    def _pairs(self, chats: Sequence[Chat]) -> Iterator[tuple[str, str]]:
        """(prompt, answer) texts of the messages to be learned."""
        for chat in chats:
            places = chat.answers if self._data.learn_on == "all" else chat.answers[-1:]
            for place in places:
                pair = self._pair(self._with_system(chat.messages[: place + 1]), chat)
                for text in pair:
                    check_characters(text, chat.who)
                yield pair

    def _pair(self, turns: list[Message], chat: Chat) -> tuple[str, str]:
        """Chat markup with the answer's turn opened, or `User: ...` lines; the last turn."""
        if self._chat is not None:
            tools = json.loads(chat.tools) if chat.tools else None
            return self._chat.render_answer(turns, chat.who, tools)
        check_plain(turns, chat.who)
        return conversation_text(turns[:-1]), f" {turns[-1].content or ''}"

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
        """(prompt ids, answer ids with an end token).

        The answer's ids are cut from the whole text's if these start with the prompt's: some
        tokenizers put a blank before a separate text.
        """
        has_start = self._chat is None
        prompts = encode_prompts([p for p, _ in pairs], self._tokenizer, with_start=has_start)
        wholes = encode_prompts([p + a for p, a in pairs], self._tokenizer, with_start=has_start)
        for (_, text), prompt, whole in zip(pairs, prompts, wholes, strict=True):
            if whole[: len(prompt)] == prompt:
                answer = whole[len(prompt) :]
            else:
                answer = self._tokenizer.encode(text, add_special_tokens=False)
            is_ended = not has_start and bool(answer) and answer[-1] in self._end_ids
            yield prompt, answer if is_ended else [*answer, int(self._tokenizer.eos_token_id)]
