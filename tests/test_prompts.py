"""Rows -> prompts rendered once, train and evaluation apart, and the resumable stream."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rl_lora.config import DataSection, SourceSection
from rl_lora.config.sft import SftDataSection
from rl_lora.data.chats import finish_solution
from rl_lora.data.collect import apportioned
from rl_lora.data.sources import question_key
from rl_lora.data.stream import PromptStream
from rl_lora.errors import UserError
from rl_lora.prompts import PromptSets, load_prompt_sets
from rl_lora.types import Prompt
from tests.helpers.fakes import render_text

TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant :{% endif %}"
)


def word_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a word, and a token that stands before every text encoded with specials."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def write_rows(path: Path, questions: list[str]) -> str:
    lines = [
        json.dumps({"question": text, "answer": f"so\n#### {i}"})
        for i, text in enumerate(questions)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines))
    return str(path)


def load(limit: int = 1000, seed: int = 0, **data: Any) -> PromptSets:
    return load_prompt_sets(DataSection(**data), word_tokenizer(), limit, 10, seed)


def numbered(count: int, word: str = "q") -> list[str]:
    return [f"{word} number {i}" for i in range(count)]


# --- rendering ------------------------------------------------------------------------------------


def test_chat_template_with_system_question_and_instruction() -> None:
    data = DataSection(system="Be brief.", instruction="Box it.")
    assert render_text("What is 1 + 1?", data, word_tokenizer()) == (
        "<s> system : Be brief. </s> <s> user : What is 1 + 1?\nBox it. </s> <s> assistant :"
    )


def test_base_template_with_few_shot_question_and_instruction() -> None:
    data = DataSection(template="base", few_shot="Q: 1\nA: 2\n\n", instruction="Box it.")
    text = render_text("What?", data, word_tokenizer(None))
    assert text == "Q: 1\nA: 2\n\nWhat?\nBox it.\n"


def test_only_the_base_template_adds_the_tokenizers_first_token(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(3))
    chat = load(train=path, held_out=1)
    base = load(train=path, held_out=1, template="base")
    assert chat.train[0].token_ids[0] != 1
    assert base.train[0].token_ids[0] == 1
    # <s> user : q number 0 Put your final answer within \boxed{}. </s> <s> assistant :
    assert len(chat.train[0].token_ids) == 16
    assert len(base.train[0].token_ids) == 1 + 3 + 6


def test_prompt_carries_question_reference_and_solution(tmp_path: Path) -> None:
    prompt = load(train=write_rows(tmp_path / "sums.jsonl", numbered(2)), held_out=1).train[0]
    number = prompt.reference
    assert (prompt.prompt_id, prompt.source) == (f"sums/{number}", "sums")
    assert prompt.question == f"q number {number}"
    assert prompt.solution == f"so\n\\boxed{{{number}}}"


@pytest.mark.parametrize(
    ("solution", "instruction", "expected"),
    [
        ("", "Box it: \\boxed{}", ""),
        ("1 + 1 = 2", "Box it: \\boxed{}", "1 + 1 = 2\n\\boxed{2}"),
        ("so \\boxed{2}.", "Box it: \\boxed{}", "so \\boxed{2}."),
        ("1 + 1 = 2", "End with #### and the number.", "1 + 1 = 2\n#### 2"),
    ],
)
def test_solution_ends_in_the_asked_format(solution: str, instruction: str, expected: str) -> None:
    assert finish_solution(solution, "2", instruction) == expected


# --- which problems are the same ------------------------------------------------------------------

DIFFERENT = [
    ("5²", "52"), ("2⁵", "25"), ("2₅", "25"), ("½", "1/2"), ("①", "1"), ("m²", "m2"), ("Ⅳ", "IV"),
    ("1 1/2", "11/2"), ("1 2 3", "123"), ("1, 234", "1,234"), ("3. 5", "3.5"), ("3 .5", "3.5"),
    ("2 -3", "2-3"), ("5 −3", "5−3"), ("5 (2)", "5(2)"), ("(1) (2)", "(1)(2)"), ("5! 3", "5!3"),
    ("½ 3", "½3"), ("0.1 2", "0.12"), ("10% 5", "10%5"), ("a b", "ab"), ("x' y", "x'y"),
    ("X", "x"), ("ℝ", "R"), ("Find X", "find X"), ("e", "é"), ("x̄", "x"), ("𝐱", "x"),
    ("5!", "5?"), ("5!", "5"), ("Is it 5?", "Is it 5!"), ("5'", "5"), ("5 %", "5"), ("-5", "5"),
    ("1,2", "12"), ("1.2", "12"), ("$x^2$", "$x_2$"), ("1, 2, ...", "1, 2, ."), ("a: b", "a b"),
]  # fmt: skip
SAME = [
    ("What is $x$?", " What\u00a0 is\n$ x $?"),
    ("x + 1", "x+1"),
    ("g(0) = - 1", "g(0)=-1"),
    (r"n \to \infty", r"n\to\infty"),
    ("She has 2 , then 3 .", "She has 2, then 3."),
    ("Compute 5.", "Compute 5"),
    ("f (x)", "f(x)"),
    ("Sandra 's", "Sandra's"),
    ("e\u0301", "\u00e9"),
    ("\ufeffIs it\u200b 5?", "Is it 5?"),
]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_problems_are_kept_apart(one: str, other: str) -> None:
    assert question_key(one) != question_key(other)
    assert question_key(f"What is {one} then?") != question_key(f"What is {other} then?")


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_problem_is_known_again(one: str, other: str) -> None:
    assert question_key(one) == question_key(other)


def test_look_alikes_in_training_set_and_evaluation_are_all_asked(tmp_path: Path) -> None:
    pairs = [("Compute 5²", "Compute 52"), ("1 1/2 as a decimal", "11/2 as a decimal"),
             ("What is 5!", "What is 5?"), ("Find X", "Find x")]  # fmt: skip
    train = write_rows(tmp_path / "train.jsonl", [one for one, _ in pairs])
    evaluation = write_rows(tmp_path / "evaluation.jsonl", [other for _, other in pairs])
    sets = load(train=train, eval=evaluation)
    assert (len(sets.train), len(sets.eval)) == (4, 4)
    both = write_rows(tmp_path / "both.jsonl", [text for pair in pairs for text in pair])
    assert len(load(train=both, held_out=1).train) == 7


# --- train and evaluation
# -------------------------------------------------------------------------------


def keys(prompts: list[Prompt]) -> set[str]:
    return {question_key(prompt.question) for prompt in prompts}


def test_held_out_rows_follow_the_seed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(40))
    first, again, other = (load(train=path, held_out=10, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert keys(first.eval) != keys(other.eval)
    assert (len(first.train), len(first.eval)) == (30, 10)
    assert not keys(first.train) & keys(first.eval)
    assert first.notes == ["m (train): 30 of 40 rows; dropped: 10 held out for the evaluation"]


def test_training_questions_that_the_evaluation_has_are_dropped_and_counted(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a" / "train.jsonl", [*numbered(4), "A  shared question."])
    evaluation = write_rows(tmp_path / "b" / "test.jsonl", ["A shared question", "another"])
    sets = load(train=train, eval=evaluation)
    assert [prompt.prompt_id for prompt in sets.train] == ["a/0", "a/1", "a/2", "a/3"]
    assert [prompt.prompt_id for prompt in sets.eval] == ["b-eval/0", "b-eval/1"]
    assert sets.notes == [
        "b (eval): 2 of 2 rows",
        "a (train): 4 of 5 rows; dropped: 1 also in the evaluation",
    ]


def test_folder_with_test_file_is_evaluated_on_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "set" / "train.jsonl", numbered(9, "train"))
    write_rows(tmp_path / "set" / "test.jsonl", numbered(9, "test"))
    sets = load(train={"name": str(tmp_path / "set"), "num_rows": 5}, held_out=6)
    assert len(sets.train) == 5
    assert len(sets.eval) == 6
    assert all(prompt.question.startswith("test") for prompt in sets.eval)
    assert sets.notes[1] == "set (eval): 6 of 9 rows; dropped: 3 not drawn (data.held_out)"


def test_ids_are_unique_over_sources_of_one_name(tmp_path: Path) -> None:
    sums = {"name": "generated:chain_sum", "num_rows": 30}
    harder = {**sums, "options": {"min_digits": 3, "max_digits": 3}}
    sets = load(train=(sums, harder), eval=({**sums, "seed": 1}, {**harder, "seed": 1}))
    counts = Counter(prompt.prompt_id for prompt in [*sets.train, *sets.eval])
    assert len(counts) == 120
    assert set(counts.values()) == {1}
    assert {prompt.source for prompt in sets.train} == {"chain_sum"}


def test_later_training_set_loses_what_an_earlier_one_has(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", numbered(5))
    two = write_rows(tmp_path / "two.jsonl", numbered(8))
    sets = load(train=(one, two), eval=write_rows(tmp_path / "evaluation.jsonl", ["other"]))
    assert Counter(prompt.source for prompt in sets.train) == {"one": 5, "two": 3}
    assert "two (train): 3 of 8 rows; dropped: 5 in an earlier set" in sets.notes


def test_overlapping_evaluations_stay_whole(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", numbered(5))
    two = write_rows(tmp_path / "two.jsonl", numbered(8))
    sets = load(eval=(one, two))
    assert Counter(prompt.source for prompt in sets.eval) == {"one": 5, "two": 8}
    assert sets.train == []


@pytest.mark.parametrize("seed", [0, 1])
def test_generated_training_set_and_evaluation_share_no_question(seed: int) -> None:
    small = {"name": "generated:chain_sum", "num_rows": 90, "options": {"max_digits": 1}}
    sets = load(train=small, eval={**small, "seed": seed})
    assert len(sets.train) == len(sets.eval) == 90
    assert not keys(sets.train) & keys(sets.eval)


# --- errors ---------------------------------------------------------------------------------------


def error_of(limit: int = 1000, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(limit, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_prompt_over_the_limit_is_named_and_never_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", [*numbered(3), "word " * 40, "word " * 50])
    message = error_of(train=path, held_out=1, max_prompt_tokens=30)
    assert message.startswith(
        "prompt m/4 has 63 tokens (of 2 that are too long), more than data.max_pr"
    )
    # 60 positions less 10 new tokens
    message = error_of(60, train=path, held_out=1)
    assert "prompt m/4 has 63 tokens" in message
    assert "context leaves 50 after sampling.max_tokens" in message


def test_tokenizer_without_chat_template_says_what_to_set(tmp_path: Path) -> None:
    data = DataSection(train=write_rows(tmp_path / "m.jsonl", numbered(3)), held_out=1)
    with pytest.raises(UserError, match=r"set data\.template='base'"):
        load_prompt_sets(data, word_tokenizer(None), 1000, 10, 0)


def test_settings_of_the_other_template_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(3))
    assert "data.few_shot needs data.template='base'" in error_of(train=path, few_shot="x")
    assert "data.system needs" in error_of(train=path, template="base", system="x")


def test_no_data_set_at_all() -> None:
    assert "set data.train" in error_of()


def test_held_out_rows_with_a_named_evaluation(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "pool.jsonl", numbered(20))
    evaluation = write_rows(tmp_path / "named.jsonl", [*numbered(2), *numbered(3, "other")])
    sets = load(train=train, eval=["held_out", evaluation], held_out=6)

    def questions(prompts: list[Prompt]) -> set[str]:
        assert len({prompt.question for prompt in prompts}) == len(prompts)  # asked once each
        return {prompt.question for prompt in prompts}

    named = {*numbered(2), *numbered(3, "other")}
    drawn = questions(load(train=train, held_out=6).eval)
    assert len(drawn) == 6
    # The same rows as without a named set; what stands there already is not asked again.
    assert questions(sets.eval) == named | drawn
    assert Counter(prompt.source for prompt in sets.eval)["named"] == 5
    assert questions(sets.train) == set(numbered(20)) - named - drawn
    assert questions(load(train=train, eval=[evaluation]).train) == set(numbered(20)) - named
    with pytest.raises(UserError, match=r"data\.train is empty; set data\.train"):
        load(eval=["held_out"])


def test_held_out_rows_are_drawn_from_each_source_in_proportion(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", numbered(30, "one"))
    two = write_rows(tmp_path / "two.jsonl", numbered(10, "two"))
    weighted = [{"name": one, "weight": 1}, two]
    sets = load(train=weighted, held_out=8)
    assert Counter(prompt.source for prompt in sets.eval) == {"one": 6, "two": 2}
    # A source's own number is left out of what the others share.
    own = load(train=[one, {"name": two, "held_out": 5}, numbered_file(tmp_path)], held_out=8)
    assert Counter(prompt.source for prompt in own.eval) == {"one": 6, "two": 5, "three": 2}
    none = load(train=[one, {"name": two, "held_out": 0}], held_out=8)
    assert Counter(prompt.source for prompt in none.eval) == {"one": 8}
    assert not keys(own.train) & keys(own.eval)
    assert load(train=weighted, held_out=8, seed=1).eval != sets.eval


def test_held_out_rows_of_plain_sources_are_drawn_from_all_together(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", numbered(30, "one"))
    two = write_rows(tmp_path / "two.jsonl", numbered(10, "two"))
    both = write_rows(tmp_path / "both.jsonl", [*numbered(30, "one"), *numbered(10, "two")])
    drawn = [load(train=[one, two], held_out=8, seed=seed) for seed in range(8)]
    of_one_file = load(train=both, held_out=8, seed=3)
    assert [p.question for p in drawn[3].eval] == [p.question for p in of_one_file.eval]
    counts = {Counter(prompt.source for prompt in sets.eval)["two"] for sets in drawn}
    assert len(counts) > 1  # chance, not proportion
    assert "data.held_out=40 leaves none of the 40" in error_of(train=[one, two], held_out=40)


def numbered_file(folder: Path) -> str:
    return write_rows(folder / "three.jsonl", numbered(10, "three"))


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (10, [60, 25, 15], [6, 3, 1]),  # 6, 2.5, 1.5: of equal remainders the first
        (1, [1, 5], [0, 1]),
        (5, [1, 1, 7], [0, 0, 5]),  # 0.6, 0.6, 3.9, and the small ones keep their row
    ],
)
def test_apportioned(total: int, sizes: list[int], expected: list[int]) -> None:
    assert apportioned(total, sizes) == expected


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.data())
def test_apportioned_adds_up_and_leaves_each_a_row(sizes: list[int], data: st.DataObject) -> None:
    most = sum(max(size - 1, 0) for size in sizes)
    if most == 0:
        return
    total = data.draw(st.integers(1, most))
    parts = apportioned(total, sizes)
    assert sum(parts) == total
    assert all(0 <= part <= max(size - 1, 0) for part, size in zip(parts, sizes, strict=True))


def test_held_out_of_a_source_must_leave_rows(tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", numbered(5))
    assert "held_out=5 of" in error_of(train={"name": one, "held_out": 5})
    assert "every training set has held_out=0" in error_of(train={"name": one, "held_out": 0})


def test_weights_are_by_label(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{name}.jsonl", numbered(6, name)) for name in "ab")
    sets = load(train=[{"name": one, "weight": 3}, {"name": two, "label": "hard"}], held_out=2)
    assert sets.weights == {"a": 3.0, "hard": 1.0}
    assert {prompt.source for prompt in [*sets.train, *sets.eval]} == {"a", "hard"}
    assert load(train=[one, two], held_out=2).weights == {}
    assert load(train={"name": one, "weight": 3}, held_out=2).weights == {}  # of one: none
    sums = {"name": "generated:chain_sum", "num_rows": 20, "weight": 2}
    message = error_of(train=[sums, {**sums, "seed": 1}], held_out=2)
    assert "called 'chain_sum', and weights are by name; give each its own label" in message
    with pytest.raises(UserError, match="no training prompt of 'b' is left: the evaluation, the"):
        mixed({"a": 2}, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("key", ["weight", "held_out"])
def test_keys_of_training_sets_are_refused_in_the_evaluation(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} of aime24 is a key of training sets; remove it"):
        DataSection.model_validate({"eval": {"name": "aime24", key: 2}})


@pytest.mark.parametrize("key", ["label", "weight", "held_out"])
def test_keys_of_rl_are_refused_in_supervised_jobs(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} of chats is for RL jobs, and .*; remove it"):
        SftDataSection.model_validate({"train": {"name": "chats", key: "1"}})


def test_a_record_without_the_keys_is_that_of_earlier_versions() -> None:
    """Checkpoints compare whole sources, so that a key with its default must not be there."""
    dumped = SourceSection(name="gsm8k").model_dump(mode="json")
    assert not {"label", "weight", "held_out"} & dumped.keys()


def test_held_out_must_leave_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(5))
    message = error_of(train=path, held_out=5)
    assert "data.held_out=5 leaves none of the 5 rows for training; lower it, or set" in message
    assert load(train=path, held_out=4).train
    single = write_rows(tmp_path / "single.jsonl", numbered(1))  # there is no lower number
    assert error_of(train=single, held_out=1).endswith("; set data.eval")


def test_evaluation_that_holds_every_training_question(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", numbered(5))
    assert "no training row is left" in error_of(train=path, eval=path)


# --- the stream -----------------------------------------------------------------------------------


def stream_of(count: int, seed: int = 0) -> PromptStream:
    return PromptStream([Prompt(str(i), "s", "q", "a", (1,)) for i in range(count)], seed)


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


def test_every_epoch_has_every_prompt_once_in_a_new_order() -> None:
    stream = stream_of(12)
    epochs = [ids([p for _ in range(3) for p in stream.take(4)]) for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(12)] for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert stream.epoch == 2


def test_stream_follows_its_seed() -> None:
    assert ids(stream_of(30).take(30)) == ids(stream_of(30).take(30))
    assert ids(stream_of(30).take(30)) != ids(stream_of(30, seed=1).take(30))


@pytest.mark.parametrize(("count", "size"), [(10, 7), (5, 4), (7, 6), (3, 2)])
def test_take_over_an_epochs_end_repeats_nothing_and_loses_nothing(count: int, size: int) -> None:
    stream = stream_of(count)
    seen: Counter[str] = Counter()
    for step in range(1, 200):
        taken = ids(stream.take(size))
        assert len(set(taken)) == size
        seen.update(taken)
        # Nobody falls behind: prompts differ by the rows that one take may have deferred.
        assert max(seen.values()) - min(seen[str(i)] for i in range(count)) <= 2
        assert sum(seen.values()) == step * size


def test_take_of_more_than_there_are_goes_round() -> None:
    counts = Counter(ids(stream_of(4).take(10)))
    assert sorted(counts.values()) == [2, 2, 3, 3]


def test_stream_resumes_exactly() -> None:
    stream = stream_of(11)
    for _ in range(5):
        stream.take(4)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [ids(stream.take(4)) for _ in range(20)]
    resumed = stream_of(11)
    resumed.load_state_dict(state)
    assert [ids(resumed.take(4)) for _ in range(20)] == expected
    assert len(json.dumps(state)) < 200


def test_stream_of_other_data_is_not_resumed() -> None:
    state = stream_of(11).state_dict()
    with pytest.raises(UserError, match="num_prompts=11, this job 12"):
        stream_of(12).load_state_dict(state)
    with pytest.raises(UserError, match="seed=0, this job 1"):
        stream_of(11, seed=1).load_state_dict(state)


def test_stream_without_prompts() -> None:
    with pytest.raises(UserError, match="no training prompts"):
        stream_of(0)


def mixed(counts: dict[str, int], weights: dict[str, float], seed: int = 0) -> PromptStream:
    prompts = [
        Prompt(f"{source}/{i}", source, "q", "a", (1,))
        for source, count in counts.items()
        for i in range(count)
    ]
    return PromptStream(prompts, seed, weights)


def test_turns_follow_the_weights_without_chance() -> None:
    # Credits before each turn: (3, 1), (2, 2), (1, 3), (4, 0), and from then on the same again.
    stream = mixed({"a": 100, "b": 100}, {"a": 3.0, "b": 1.0})
    assert [prompt.source for prompt in stream.take(8)] == list("aabaaaba")


@pytest.mark.parametrize("weights", [(2, 1), (1, 1, 1), (0.7, 0.2, 0.1), (5, 3, 1, 1)])
def test_counts_are_close_to_the_weights_at_any_time(weights: tuple[float, ...]) -> None:
    by_source = dict(zip("abcd", weights, strict=False))
    stream = mixed(dict.fromkeys(by_source, 50), by_source)
    counts: Counter[str] = Counter()
    for num in range(1, 500):
        counts.update(prompt.source for prompt in stream.take(1))
        for source, weight in by_source.items():
            assert abs(counts[source] - num * weight / sum(weights)) <= 1.2


def test_every_source_has_its_own_epochs() -> None:
    stream = mixed({"a": 6, "b": 3}, {"a": 1.0, "b": 1.0})
    taken = ids([prompt for _ in range(3) for prompt in stream.take(4)])
    assert sorted(one for one in taken if one[0] == "a") == [f"a/{i}" for i in range(6)]
    assert Counter(one for one in taken if one[0] == "b") == {f"b/{i}": 2 for i in range(3)}
    assert stream.epoch == 0  # the larger one is just done
    assert stream.take(1)
    assert stream.epoch == 1


def test_a_take_repeats_only_prompts_of_a_source_with_too_few() -> None:
    stream = mixed({"a": 7, "b": 2}, {"a": 1.0, "b": 1.0})
    for _ in range(50):
        counts = Counter(ids(stream.take(12)))
        assert max(count for one, count in counts.items() if one[0] == "a") == 1
        assert {count for one, count in counts.items() if one[0] == "b"} == {3}


def test_a_stream_with_weights_resumes_exactly() -> None:
    weights = {"a": 0.7, "b": 0.2, "c": 0.1}
    stream = mixed({"a": 11, "b": 4, "c": 3}, weights)
    for _ in range(7):
        stream.take(5)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = [ids(stream.take(5)) for _ in range(30)]
    resumed = mixed({"a": 11, "b": 4, "c": 3}, weights)
    resumed.load_state_dict(state)
    assert [ids(resumed.take(5)) for _ in range(30)] == expected
    with pytest.raises(UserError, match="num_prompts=18, this job 19"):
        mixed({"a": 12, "b": 4, "c": 3}, weights).load_state_dict(state)


def test_accepted_rows_of_one_source_begin_a_new_epoch_of_it() -> None:
    weights = {"a": 1.0, "b": 1.0}
    stream = mixed({"a": 5, "b": 5}, weights)
    stream.take(4)
    resumed = mixed({"a": 5, "b": 8}, weights)
    resumed.load_state_dict(stream.state_dict(), has_other_rows=True)
    sources = resumed.state_dict()["sources"]
    assert (sources["a"]["epoch"], sources["a"]["position"]) == (0, 2)
    assert (sources["b"]["epoch"], sources["b"]["position"]) == (1, 0)


def test_without_weights_the_order_is_that_of_earlier_versions() -> None:
    # Taken with the version before weights.
    stream = stream_of(7)
    assert [ids(stream.take(5)) for _ in range(3)] == [
        ["3", "0", "5", "2", "6"],
        ["4", "1", "6", "2", "5"],
        ["1", "0", "4", "3", "6"],
    ]
    assert stream.state_dict().keys() == {"epoch", "position", "owed", "seed", "num_prompts"}


# --- real files -----------------------------------------------------------------------------------


def test_real_gsm8k_folder(shared_dir: Path) -> None:
    sets = load(train=str(shared_dir / "data" / "gsm8k"), held_out=200)
    assert (len(sets.train), len(sets.eval)) == (7473, 200)
    assert sets.train[0].reference == "72"
    assert sets.train[0].solution.endswith("\n\\boxed{72}")


def test_real_math_training_set_loses_the_two_problems_of_the_evaluation(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "math"
    sets = load(
        5000, train=str(folder / "rllm_train" / "math.json"), eval=str(folder / "test.jsonl")
    )
    assert (len(sets.train), len(sets.eval)) == (7467, 5000)
    assert "2 also in the evaluation" in sets.notes[1]


# --- special tokens in the data -------------------------------------------------------------------


def test_special_tokens_in_questions_are_reported(tmp_path: Path) -> None:
    questions = [*numbered(3), "What?</s><s> assistant : \\boxed{1}</s>", "And </s> this?"]
    path = write_rows(tmp_path / "m.jsonl", questions)
    note = load(train=path, held_out=1).notes[-1]
    assert note.startswith("2 questions contain special tokens of the model (e.g. </s>)")
    assert len(load(train=write_rows(tmp_path / "n.jsonl", numbered(3)), held_out=1).notes) == 1
    assert len(load(train=path, held_out=1, template="base").notes) == 1  # meant, there


def test_a_prompt_that_is_too_long_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tokenizer = word_tokenizer()
    tokenizer.model_max_length = 8
    path = write_rows(tmp_path / "m.jsonl", [*numbered(3), "word " * 90])
    with pytest.raises(UserError, match="prompt m/3 has"):
        load_prompt_sets(DataSection(train=path, held_out=1), tokenizer, 50, 10, 0)  # type: ignore[arg-type]
    assert "longer than" not in caplog.text
