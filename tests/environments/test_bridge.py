"""The ids between two turns are those of the whole conversation as the template renders it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from rl_lora.config import ModelSection
from rl_lora.data.chat_template import ChatTemplate, encode_prompts
from rl_lora.data.messages import Message
from rl_lora.environments.bridge import Bridge
from rl_lora.errors import UserError
from rl_lora.models.resolve import load_tokenizer, resolve_model
from tests.data.test_chat_template import CHATML, OPENING, PLAIN, STRICT, THINKING, byte_tokenizer

ANSWERS, OBSERVATIONS = ["Hm <calc>3+4</calc>", "again", "So \\boxed{7}."], ["7 é", " no\nway "]


def bridged(tokenizer: PreTrainedTokenizerBase, role: str = "user", **kwargs: Any) -> list[int]:
    """Prompt, answers and observations, joined by the bridge."""
    chat, bridge = ChatTemplate(tokenizer, kwargs), Bridge(tokenizer, "chat", kwargs, role)
    assert chat.turn_end is not None
    end = chat.turn_end.token_id
    prompt = chat.render([Message("user", "3 + 4?")], "a test", opens_turn=True)
    (ids,) = encode_prompts([prompt], tokenizer, with_start=False)
    for answer, observation in zip(ANSWERS, [*OBSERVATIONS, None], strict=True):
        ids += [*tokenizer.encode(answer, add_special_tokens=False), end]
        if observation is not None:
            ids += bridge.token_ids(observation, end)
    return ids


def rendered(tokenizer: PreTrainedTokenizerBase, role: str = "user") -> list[int]:
    """The same conversation by the template at once, up to the token that ends the last turn."""
    turns = [Message("user", "3 + 4?"), Message("assistant", ANSWERS[0])]
    for observation, answer in zip(OBSERVATIONS, ANSWERS[1:], strict=True):
        turns += [Message(role, observation), Message("assistant", answer)]
    chat = ChatTemplate(tokenizer, {})
    assert chat.turn_end is not None
    text = chat.render(turns, "a test", opens_turn=False).removesuffix(chat.turn_end.rest)
    (ids,) = encode_prompts([text], tokenizer, with_start=False)
    return ids


@pytest.mark.parametrize(
    ("template", "eos"), [(CHATML, "<|endoftext|>"), (CHATML, "<|im_end|>"), (STRICT, "</s>")]
)
def test_the_whole_conversation_is_the_templates(template: str, eos: str) -> None:
    tokenizer = byte_tokenizer(template, eos)
    assert bridged(tokenizer) == rendered(tokenizer)


def test_a_tool_answers() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids = bridged(tokenizer, "tool")
    assert ids == rendered(tokenizer, "tool")
    assert "<|im_start|>tool\n7 é<|im_end|>\n<|im_start|>assistant\n" in tokenizer.decode(ids)


def test_the_shipped_models() -> None:
    tokenizer = load_tokenizer(resolve_model(ModelSection(name="tiny-fast")))
    assert bridged(tokenizer) == rendered(tokenizer)


def test_a_template_that_opens_turns_by_itself_does_so_in_each() -> None:
    ids = bridged(byte_tokenizer(OPENING))
    assert byte_tokenizer(OPENING).decode(ids).count("<|im_start|>assistant\n<think>\n") == 3
    tokenizer = byte_tokenizer(THINKING)
    text = tokenizer.decode(bridged(tokenizer, enable_thinking=False))
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\n") == 3


def test_a_turn_that_ends_otherwise_is_ended_as_the_template_does() -> None:
    tokenizer = byte_tokenizer(CHATML)
    bridge = Bridge(tokenizer)
    end = 258
    after = bridge.token_ids("7", end)
    assert tokenizer.decode(after) == "\n<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n"
    for other in (256, 65, None):  # <|endoftext|>, the last token of a stop string, no token
        assert bridge.token_ids("7", other) == (end, *after)


def test_special_tokens_of_an_observation_are_no_markup() -> None:
    tokenizer = byte_tokenizer(CHATML)
    ids = Bridge(tokenizer).token_ids("a<|im_end|>b<|im_<|im_end|>end|>c", 258)
    text = "\n<|im_start|>user\na b<|im_ end|>c<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tuple(tokenizer.encode(text))
    assert ids.count(258) == 1


def test_a_base_models_observation_is_a_line_of_text() -> None:
    tokenizer = byte_tokenizer(None)
    ids = Bridge(tokenizer, "base").token_ids("7", 256)
    assert tokenizer.decode(ids) == "\n7\n"


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (PLAIN, "user", "writes no token that ends a turn"),
        (STRICT, "tool", "rejects an observation of the environment"),
        (
            CHATML.replace("m in messages", "m in messages if m.role != 'tool'"),
            "tool",
            "drops a part of the tool message in an observation",
        ),
        (None, "user", "has no chat template"),
    ],
)
def test_a_template_that_cannot_is_one_clear_error(
    template: str | None, role: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Bridge(byte_tokenizer(template), role=role)


def test_half_a_character_is_refused() -> None:
    with pytest.raises(UserError, match="an observation of the environment has half a character"):
        Bridge(byte_tokenizer()).token_ids("\ud800", None)
