"""Chat templates as models ship them: whole conversations, where a turn ends, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rl_lora.config import DataSection, load_config
from rl_lora.config.sft import SftDataSection
from rl_lora.data.chat_template import ChatTemplate, encode_prompts, end_of_turn
from rl_lora.data.messages import Message
from rl_lora.errors import UserError
from rl_lora.prompts import load_prompt_sets
from rl_lora.sampler import Stops
from rl_lora.samplers.end_tokens import end_token_ids
from rl_lora.sft.data import load_sft
from rl_lora.sft.warm_start import solution_sample
from rl_lora.types import Prompt

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3's: reasoning, an empty one in the last answer, tool calls, enable_thinking.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n"
    "</think>\n\n{% endif %}{{ m.content if m.content is string else '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# As Mistral's: alternation, no system messages, the tokenizer's end token.
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}"
    "{% endfor %}"
)
# As QwQ's: a prompt opens with <think>, an answer does not.
OPENING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
HI = {"role": "user", "content": "Hi"}


def byte_tokenizer(
    template: Any = CHATML, eos: str = "<|endoftext|>", *, special: bool = True, ends: str = ""
) -> PreTrainedTokenizerFast:
    """One token a byte, MARKS after them; `ends`: 'start', 'end' or both put round a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({one: i for i, one in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    if ends:
        single = f"{'<s> ' if 'start' in ends else ''}$A{' </s>' if 'end' in ends else ''}"
        marks = [(mark, 256 + MARKS.index(mark)) for mark in ("<s>", "</s>") if mark in single]
        tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>")
    fast.chat_template = template
    return fast


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(*turns: tuple[str, Any], **last: Any) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    messages[-1] |= last
    return {"messages": messages}


def learnt(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **data: Any
) -> list[tuple[str, str]]:
    """(prompt, completion) of the rows, as text with its special tokens."""
    test = write(
        folder / "test.jsonl", [{"messages": [HI, {"role": "assistant", "content": "Ho"}]}]
    )
    train = write(folder / "train.jsonl", rows)
    section = SftDataSection(train=str(train), eval=str(test), **data)
    sets = load_sft(section, tokenizer, 4096, 0)
    return [
        (
            str(tokenizer.decode(list(one.prompt_ids))),
            str(tokenizer.decode(list(one.completion_ids))),
        )
        for one in sets.train
    ]


def prompt_texts(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, **data: Any
) -> list[str]:
    test = write(folder / "test.jsonl", [{"question": "else", "answer": "1"}])
    train = write(folder / "train.jsonl", rows)
    section = DataSection(train=str(train), eval=str(test), instruction="", **data)
    sets = load_prompt_sets(section, tokenizer, 4096, 10, 0)
    return [str(tokenizer.decode(list(prompt.token_ids))) for prompt in sets.train]


# --- where a turn ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "eos", "special", "end"),
    [
        (CHATML, "<|endoftext|>", True, "<|im_end|>"),
        (CHATML, "<|im_end|>", True, "<|im_end|>"),
        (CHATML, "<|endoftext|>", False, "<|im_end|>"),
        (THINKING, "<|endoftext|>", True, "<|im_end|>"),
        (STRICT, "</s>", True, "</s>"),
        (PLAIN, "</s>", True, "</s>"),  # no mark at all: the tokenizer's end token
        ("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
         "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
         "<|endoftext|>", True, "<|im_end|>"),  # as Phi-3's
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_the_templates(
    template: str, eos: str, special: bool, end: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(template, eos, special=special)
    number = 256 + MARKS.index(end)
    assert end_of_turn(tokenizer, "chat", {}) == number
    assert end_of_turn(tokenizer, "base", {}) == tokenizer.eos_token_id
    ends = end_token_ids(tmp_path, tokenizer)
    assert set(ends) == {number, tokenizer.eos_token_id}
    assert end_token_ids(tmp_path, tokenizer, "base") == (tokenizer.eos_token_id,)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "3?"},
                {"role": "assistant", "content": "It is 3"},
            ]
        }
    ]
    ((_, answer),) = learnt(tmp_path, rows, tokenizer)
    assert answer.endswith(f"It is 3{end}" if template != PLAIN else f"It is 3\n{end}")
    prompt = Prompt("p", "s", "q", "3", (5,), solution="so 3")
    sample = solution_sample(prompt, tokenizer, end_of_turn(tokenizer, "chat", {}))
    assert tokenizer.decode(list(sample.completion_ids)) == f"so 3{end}"


def test_stops_that_are_special_tokens_are_known_by_id() -> None:
    tokenizer = byte_tokenizer()
    assert Stops.of((), tokenizer) == Stops((), (), False)
    assert Stops.of(("\n\n",), tokenizer) == Stops((), ("\n\n",), False)
    assert Stops.of(("<|im_end|>", "\n\n"), tokenizer) == Stops((258,), ("\n\n",), False)
    assert Stops.of(("<|im_end|>\n",), tokenizer) == Stops((), ("<|im_end|>\n",), True)
    assert Stops.of(("<|im_end|>",), byte_tokenizer(special=False)) == Stops(
        (), ("<|im_end|>",), False
    )


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(UserError, match=r"sampling\.stop .*empty string matches everywhere"):
        load_config(None, ['sampling.stop=["\\n", ""]'])


# --- what is rendered and learnt ------------------------------------------------------------------


def test_every_message_of_a_prompt_is_rendered(tmp_path: Path) -> None:
    conversation = [
        {"role": "system", "content": "Answer in base 8."},
        {"role": "user", "content": "Let x = 3."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "What is x?"},
    ]
    expected = (
        "<|im_start|>system\nAnswer in base 8.<|im_end|>\n<|im_start|>user\nLet x = 3.<|im_end|>\n"
        "<|im_start|>assistant\nNoted.<|im_end|>\n<|im_start|>user\nWhat is x?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tokenizer = byte_tokenizer()
    verl = {"prompt": conversation, "reward_model": {"ground_truth": "3"}}
    for row in (
        verl,
        {"prompt": conversation, "answer": "3"},
        {"prompt": json.dumps(conversation), "answer": "3"},
        {"question": conversation, "answer": "3"},
    ):
        assert prompt_texts(tmp_path, [row], tokenizer) == [expected]
        # The row's own system message stands before the setting's.
        assert prompt_texts(tmp_path, [row], tokenizer, system="Be brief.") == [expected]
    assert prompt_texts(tmp_path, [verl], tokenizer, template="base") == [
        "System: Answer in base 8.\n\nUser: Let x = 3.\n\nAssistant: Noted.\n\nUser: What is x?\n\n"
        "Assistant:"
    ]
    named = {"name": str(tmp_path / "train.jsonl"), "question": "asked.text", "answer": "gold"}
    write(tmp_path / "train.jsonl", [{"asked": {"text": conversation}, "gold": "3"}])
    other = write(tmp_path / "test.jsonl", [{"question": "else", "answer": "1"}])
    data = DataSection(train=(named,), eval=str(other), instruction="")  # type: ignore[arg-type]
    (prompt,) = load_prompt_sets(data, tokenizer, 4096, 10, 0).train
    assert tokenizer.decode(list(prompt.token_ids)) == expected


def test_a_prompt_that_ends_in_the_assistants_words_is_continued(tmp_path: Path) -> None:
    row = {"prompt": [HI, {"role": "assistant", "content": "Let me"}], "answer": "3"}
    assert prompt_texts(tmp_path, [row], byte_tokenizer()) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nLet me"
    ]


def test_one_question_in_other_conversations_is_another_problem(tmp_path: Path) -> None:
    def row(system: str, earlier: str) -> dict[str, Any]:
        turns = [("system", system), ("user", earlier), ("assistant", "Yes."), ("user", "So?")]
        prompt = [{"role": role, "content": content} for role, content in turns]
        return {"prompt": prompt, "answer": "3"}

    rows = [row("a", "x = 1"), row("a", "x = 2"), row("b", "x = 1"), row("a", "x = 1")]
    assert len(prompt_texts(tmp_path, rows, byte_tokenizer())) == 3


HEAD = "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n"
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize(
    ("template", "kwargs", "row", "expected"),
    [
        (CHATML, {}, chat(("user", "3?"), ("assistant", " 3\n")), (HEAD, " 3\n<|im_end|>")),
        (THINKING, {}, chat(("user", "3?"), ("assistant", "3")),
         (HEAD, "<think>\n\n</think>\n\n3<|im_end|>")),
        (THINKING, {"enable_thinking": False}, chat(("user", "3?"), ("assistant", "3")),
         (HEAD + "<think>\n\n</think>\n\n", "3<|im_end|>")),
        (THINKING, {}, chat(("user", "3?"), ("assistant", "3"), reasoning_content="hm"),
         (HEAD, "<think>\nhm\n</think>\n\n3<|im_end|>")),
        (THINKING, {}, chat(("user", "3?"), ("assistant", None), tool_calls=[CALL]),
         (HEAD, '<think>\n\n</think>\n\n<tool_call>add{"a": 1}<|im_end|>')),
        (OPENING, {}, chat(("user", "3?"), ("assistant", "3")),
         (HEAD + "<think>\n", "3<|im_end|>")),
        (OPENING, {}, chat(("user", "3?"), ("assistant", "<think>\nhm</think>3")),
         (HEAD + "<think>\n", "hm</think>3<|im_end|>")),
        (CHATML, {}, {**chat(("user", "3?"), ("assistant", "3")), "system": "Brief."},
         ("<|im_start|>system\nBrief.<|im_end|>\n" + HEAD, "3<|im_end|>")),
        (CHATML, {}, {"prompt": [{"role": "user", "content": "3?"}],
                      "completion": [{"role": "assistant", "content": "3"}]},
         (HEAD, "3<|im_end|>")),
        (CHATML, {}, {"instruction": "3?", "output": "3", "history": [["Hi", "Ho"]],
                      "system": "Brief."}, None),
    ],
)  # fmt: skip
def test_what_the_template_writes_is_learnt(
    template: str,
    kwargs: dict[str, Any],
    row: dict[str, Any],
    expected: tuple[str, str] | None,
    tmp_path: Path,
) -> None:
    found = learnt(tmp_path, [row], byte_tokenizer(template), chat_template_kwargs=kwargs)
    if expected is None:  # the earlier turn is learnt, too
        before = "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        before += "<|im_start|>assistant\n"
        expected = (before + "Ho<|im_end|>\n" + HEAD, "3<|im_end|>")
        assert found.pop(0) == (before, "Ho<|im_end|>")
    assert found == [expected]


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_messages_of_weight_0_and_those_of_a_prompt_are_not_learnt(
    weight: float, tmp_path: Path
) -> None:
    turns = chat(("user", "3?"), ("assistant", "WRONG"), ("user", "No."), ("assistant", "3"))
    asked = {"prompt": turns["messages"][:3], "completion": turns["messages"][3:]}
    turns["messages"][1]["weight"] = weight
    turns["messages"][3]["weight"] = 1
    for row in (turns, asked):
        for learn_on in ("all", "last"):
            ((prompt, answer),) = learnt(tmp_path, [row], byte_tokenizer(), learn_on=learn_on)
            assert answer == "3<|im_end|>"
            assert "WRONG" in prompt


# --- prompts' tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["", "start", "end", "start end"])
def test_no_prompt_ends_in_an_end_and_none_begins_twice(ends: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(STRICT, "</s>", ends=ends)
    start = "<s>" if "start" in ends else ""
    rows = [{"question": "3?", "answer": "3"}]
    assert prompt_texts(tmp_path, rows, tokenizer, template="base") == [f"{start}3?\n"]
    assert prompt_texts(tmp_path, rows, tokenizer, template="base", few_shot="<s>1\n") == [
        "<s>1\n3?\n"
    ]
    assert prompt_texts(tmp_path, rows, tokenizer) == ["<s>[INST] 3? [/INST]"]
    row = chat(("user", "3?"), ("assistant", "3"))
    assert learnt(tmp_path, [row], tokenizer) == [("<s>[INST] 3? [/INST]", "3</s>")]
    assert learnt(tmp_path, [row], tokenizer, template="base") == [
        (f"{start}User: 3?\n\nAssistant:", " 3</s>")
    ]
    assert encode_prompts([], tokenizer, with_start=True) == []


# --- refusals -------------------------------------------------------------------------------------


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
NO_ROLES_BUT_TWO = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
)
NO_THOUGHTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


@pytest.mark.parametrize(
    ("template", "data", "message"),
    [
        (None, {}, "has no chat template; set data.template='base'"),
        (NO_SYSTEM + CHATML, {"system": "x"}, "no system; remove data.system and system "),
        (NO_ROLES_BUT_TWO, {"system": "x"}, "drops a part of the system message"),
        ("{% for m in messages %}{{ m.content ", {}, "rejects .*unexpected end of template"),
        ("{{ strange_function() }}", {}, "'strange_function' is undefined"),
        ("{{ messages[0].content + none }}", {}, "rejects .*NoneType"),
        ("{{ 1 / 0 }}", {}, "rejects .*division"),
        ({"rag": CHATML, "tool_use": CHATML}, {}, r"\(rag, tool_use\) and none named default"),
        ({"rag": CHATML, "tool_use": CHATML}, {"chat_template_kwargs": {"chat_template": "rg"}},
         "neither a template nor the name of one; did you mean 'rag'"),
        (CHATML, {"chat_template_kwargs": {"enable_thinkin": False}}, "has no such variable"),
        (CHATML, {"template": "base", "chat_template_kwargs": {"x": 1}}, "needs data.template='c"),
    ],
)  # fmt: skip
def test_templates_that_refuse_fail_or_are_not_there(
    template: Any, data: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer(template)
    with pytest.raises(UserError, match=message) as rl:
        prompt_texts(tmp_path, [{"question": "3?", "answer": "3"}], tokenizer, **data)
    with pytest.raises(UserError, match=message) as sft:
        learnt(tmp_path, [chat(("user", "3?"), ("assistant", "3"))], tokenizer, **data)
    assert "\n" not in f"{rl.value}{sft.value}"


def test_the_fixes_that_are_named_work(tmp_path: Path) -> None:
    rows = [{"question": "3?", "answer": "3"}]
    named = byte_tokenizer({"rag": CHATML, "tool_use": CHATML})
    (text,) = prompt_texts(tmp_path, rows, named, chat_template_kwargs={"chat_template": "rag"})
    assert text == HEAD
    broken = byte_tokenizer("{{ strange_function() }}")
    assert prompt_texts(tmp_path, rows, broken, chat_template_kwargs={"chat_template": CHATML}) == [
        HEAD
    ]
    assert prompt_texts(tmp_path, rows, broken, template="base") == ["3?\n"]
    assert end_of_turn(broken, "chat", {"chat_template": CHATML}) == 258
    config = load_config(None, ["data.chat_template_kwargs.enable_thinking=false"])
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(UserError, match="add_generation_prompt cannot be set"):
        load_config(None, ["data.chat_template_kwargs.add_generation_prompt=false"])


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (STRICT, chat(("user", "a"), ("user", "b"), ("assistant", "3")), "row 0 .*alternate"),
        (CHATML, chat(("user", "3?"), ("assistant", "3"), reasoning_content="hm"),
         "drops 'reasoning_content'"),
        (CHATML, chat(("user", "3?"), ("assistant", "3"), tool_calls=[CALL]),
         "drops 'tool_calls'"),
        (STRICT, chat(("user", "3?"), ("assistant", None), tool_calls=[CALL]),
         "must support tool_calls"),
        (NO_THOUGHTS, chat(("user", "3?"), ("assistant", "<think>hm</think>3")),
         "drops a part of the assistant message"),
        (CHATML,
         chat(("user", "3?"), ("assistant", "3"), weight=0.5), r"weight 0.5; set 1 \(trained on\)"),
        (CHATML, chat(("user", [{"type": "image", "url": "x"}]), ("assistant", "3")),
         "row 0: the user message has a part of type 'image'"),
        (CHATML, chat(("user", 3), ("assistant", "3")), "content is of type int"),
        (CHATML, chat(("user", "hi \ud83d"), ("assistant", "3")), r"lone surrogate '\\ud83d'"),
        (CHATML, chat(("user", "hi"), ("assistant", "3 \udc00")), r"lone surrogate '\\udc00'"),
        (CHATML, {**chat(("user", "3?"), ("assistant", "3")), "tools": [CALL]},
         "drops the tool 'add'"),
    ],
)  # fmt: skip
def test_rows_that_a_template_or_a_tokenizer_does_not_take(
    template: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        learnt(tmp_path, [row], byte_tokenizer(template))
    assert "\n" not in str(caught.value)


def test_an_answer_with_reasoning_where_prompts_say_there_is_none(tmp_path: Path) -> None:
    row = chat(("user", "3?"), ("assistant", "3"), reasoning_content="hm")
    with pytest.raises(UserError, match="enable_thinking"):
        learnt(
            tmp_path,
            [row],
            byte_tokenizer(THINKING),
            chat_template_kwargs={"enable_thinking": False},
        )


def test_the_base_template_writes_only_contents(tmp_path: Path) -> None:
    row = chat(("user", "3?"), ("assistant", "3"), reasoning_content="hm")
    with pytest.raises(UserError, match=r"row 0 .* with 'reasoning_content'"):
        learnt(tmp_path, [row], byte_tokenizer(), template="base")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What? \ud83d", "answer": "2"},
        {"question": "What?", "answer": "2 \udc00"},
        {"problem": "What?", "answer": "2", "solution": "\ud83d so \\boxed{2}"},
        {"prompt": [{"role": "system", "content": "\ud83d"}, HI], "answer": "2"},
    ],
)
def test_half_characters_are_named(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompt \S+/0 has half a character .*\\ud"):
        prompt_texts(tmp_path, [row], byte_tokenizer())


def test_an_image_in_a_prompt_is_refused(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"}
    with pytest.raises(UserError, match=r"train\.jsonl, row 0: .*a part of type 'image'"):
        prompt_texts(tmp_path, [row], byte_tokenizer())


def test_arguments_of_tool_calls_as_the_template_takes_them() -> None:
    call = Message("assistant", "", json.dumps({"tool_calls": [CALL]}))
    for part, expected in (("arguments.a", "1"), ("arguments + '!'", '{"a": 1}!')):
        template = (
            "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}"
            f"{{{{ m.tool_calls[0].function.{part} }}}}{{% endif %}}{{% endfor %}}"
        )
        chat_template = ChatTemplate(byte_tokenizer(template), {})
        text = chat_template.render([Message("user", "a"), call], "x", opens_turn=False)
        assert text == f"a{expected}"
