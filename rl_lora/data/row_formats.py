r"""Reads raw data-set rows into question, gold answer and worked solution.

A row format is recognized by its columns. The gold answer is only the final answer: the text after
'####', the content of the last balanced \boxed{}, or the answer column; None if there is none.

A list of answers means either alternatives, any of which is right ("any"), or one answer of several
values, all of which are required ("all"). A source's `list_answers` says which; by default it is
"all" in rows whose column is_multiple_answer is true (OlympiadBench, arXiv 2402.14008), else "any".

OlympiadBench's column `error` is the largest difference that counts as right ("1e-1"; "" or null:
exact) and becomes the reference's tolerance. Of several ("0.1,0.02", one per value) the smallest
applies to all; if one of them is blank, there is no tolerance.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, Literal

from rl_lora.data.columns import (
    COLUMN_KEYS,
    Raw,
    check_named,
    check_text,
    parsed,
    reach,
    unpack,
)
from rl_lora.data.messages import Message, as_turns, read_messages
from rl_lora.data.references import SEPARATOR, alternatives, with_tolerance
from rl_lora.errors import UserError


@dataclass(frozen=True, slots=True)
class DataRow:
    """One problem of a data set, before rendering."""

    question: str  # "": the row has none
    reference: str | None  # final answer (`references`); None: the row has none
    solution: str = ""  # worked solution, not necessarily ending in the asked format
    row: int = 0  # position in the source, from 0
    # The whole conversation if there is more than the question (system message, earlier turns);
    # its last user message is the question.
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False
    )  # the raw row

    def asked(self, *, with_system: bool) -> str:
        """Earlier turns and question as one text, to tell problems apart."""
        shown = [one for one in self.messages if with_system or one.role != "system"]
        return "\n".join(one.content or "" for one in shown) or self.question


ListAnswers = Literal["any", "all"]
Reader = Callable[[Raw], DataRow]


# --- text helpers ---------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...} (or `\boxed 7`); None if there is none."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*", text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            bare = re.match(r"[^\s$.,;{}]+", rest)
            if bare:
                return bare.group()
            continue
        depth = 0
        for position, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:position].strip()
    return None


def number_text(value: Any) -> str:
    """A number as people write it: 51.0 -> "51", 1e-05 -> "0.00001"; other values as str."""
    if isinstance(value, float) and math.isinf(value):
        return r"\infty" if value > 0 else r"-\infty"
    if isinstance(value, float) and not math.isnan(value):
        return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def gold_text(value: Any) -> str | None:
    """An answer column's value as text, list items as alternatives; None for null, NaN or blank.

    A nested list is one answer of several values.
    """
    if (items := _list_items(value)) is not None:
        parts = [gold_text(item) for item in items]
        return SEPARATOR.join(as_one(part) for part in parts if part) or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = number_text(value).strip()
    # Some files write AIME answers (0 to 999) as "025"; the gold answer is the integer.
    return str(int(text)) if re.fullmatch(r"0\d{1,2}", text) else text or None


def as_one(reference: str) -> str:
    """The alternatives as one answer of several values. Example: "3 ||| -3" -> "3, -3"."""
    return ", ".join(alternatives(reference))


def _list_items(value: Any) -> list[Any] | None:
    """The items of a list, or of a list of texts as JSON text (Skywork-OR1's '["4"]')."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and re.match(r'\s*\[\s*"', value):
        items = parsed(value)
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    return None


def final_answer(value: Any) -> str | None:
    """`gold_text` of an answer text's final answer: after '####', else in its last box."""
    if (items := _list_items(value)) is not None:
        return gold_text([final_answer(item) if isinstance(item, str) else item for item in items])
    text = gold_text(value)
    if text is None:
        return None
    if "####" in text:
        answer = text.rsplit("####", 1)[1].strip()
        # GSM8K writes 1,080; the gold answer is the number.
        is_grouped = re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer)
        return gold_text(answer.replace(",", "") if is_grouped else answer)
    boxed = last_boxed(text)
    return gold_text(boxed) if boxed is not None else text


_ASKS = (
    re.compile(
        r"^Solve the following math problem step by step\. The last line of your response should "
        r"be of the form Answer: \$Answer \(without quotes\) where \$Answer is the answer to the "
        r"problem\.\s*"
    ),
    re.compile(r"\s*Remember to put your answer on its own line after \"Answer:\"\.?\s*$"),
    re.compile(
        r"\s*(?:Please reason|Let's think) step by step,? and (?:put your|output the) final answer "
        r"within \\+boxed\{\{?\}?\}\.?\s*$"
    ),
)


def problem(value: Any, gold: str | None, solution: str = "") -> DataRow:
    """A row from a prompt column with text or chat messages.

    Raises:
        UserError: a message is not text.
    """
    turns = as_turns(value)
    if turns is None:
        is_list = isinstance(value, list | tuple)
        return DataRow("" if is_list else bare_question(value), gold, solution)
    messages = read_messages(turns)
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    if not places:
        return DataRow("", gold, solution)
    last = places[-1]
    messages[last] = replace(messages[last], content=bare_question(messages[last].content))
    question = messages[last].content or ""
    is_plain = len(messages) == 1 and not messages[0].extra
    return DataRow(question, gold, solution, messages=() if is_plain else tuple(messages))


def bare_question(value: Any) -> str:
    """The question without a known answer instruction."""
    text = "" if value is None else str(value)
    for pattern in _ASKS:
        text = pattern.sub("", text)
    return text.strip()


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


# --- known row formats ----------------------------------------------------------------------------


def _chat_prompt(raw: Raw) -> DataRow:
    graded = raw["reward_model"]
    gold = graded.get("ground_truth") if isinstance(graded, Mapping) else None
    return problem(raw["prompt"], final_answer(gold))


def _svamp(raw: Raw) -> DataRow:
    body, question = _text(raw["Body"]), _text(raw["Question"])
    if body and body[-1] not in ".?!,":
        # 'If there is a discount of 25 dollars' + 'How much do you have to pay?'
        body += ","
    gold = _numeric(raw["Answer"])
    return DataRow(f"{body} {question}".strip(), gold, _equation(raw.get("Equation"), gold))


def _masked(raw: Raw) -> DataRow:
    """The SVAMP authors' csv files: number0, number1, ... refer to the column Numbers."""
    numbers = [_numeric(text) or "" for text in str(raw["Numbers"]).split()]

    def fill(match: re.Match[str]) -> str:
        index = int(match.group(1))
        return numbers[index] if index < len(numbers) else match.group()

    question = re.sub(r"\bnumber(\d+)\b", fill, _text(raw["Question"]))
    return DataRow(re.sub(r"\s+([,.?!])", r"\1", question), _numeric(raw["Answer"]))


def _numeric(value: Any) -> str | None:
    """`gold_text` that also reads "51.0" of a csv file as 51."""
    text = gold_text(value)
    if text is None or not re.fullmatch(r"-?\d*\.\d+|-?\d+\.", text):
        return text
    return number_text(float(text))


def _equation(equation: Any, gold: str | None) -> str:
    """'( 76.0 - 25.0 )' -> '76 - 25 = 51'."""
    text = re.sub(r"(\d+)\.0\b", r"\1", _text(equation))
    text = re.sub(r"^\( (.*) \)$", r"\1", text)  # every equation is in parentheses
    return f"{text} = {gold}" if text and gold is not None else ""


def _solved(question: str, answer: str, solution: str | None, raw: Raw) -> DataRow:
    """Reads question and answer columns; a null answer is taken from the solution's box."""
    text = _text(raw.get(solution)) if solution else ""
    gold = final_answer(raw.get(answer))
    if gold is None and text:
        gold = gold_text(last_boxed(text))
    return problem(raw.get(question), gold, text or _worked(raw.get(answer)))


def _worked(value: Any) -> str:
    """The worked solution in an answer column; "" if it has only the answer.

    GSM8K's calculator annotations <<48/2=24>> and the last line '#### 72' are removed.
    """
    text = _text(value)
    if "####" in text:
        return re.sub(r"<<[^<>]*>>", "", text.rsplit("####", 1)[0]).strip()
    return text if last_boxed(text) is not None else ""


def _boxed_solution(raw: Raw) -> DataRow:
    solution = _text(raw["solution"])
    return problem(raw["problem"], gold_text(last_boxed(solution)), solution)


def _mawps(raw: Raw) -> DataRow:
    return problem(raw["input"], _numeric(raw["target"]))


# Columns of the question, of the gold answer (`a.b`: field b of the object in column a) and others
# that identify the format, and how such rows are read; None: `_solved`. The first one whose columns
# are all present is used, so the more specific ones come first.
ROW_FORMATS: tuple[tuple[str, Reader | None], ...] = (
    ("prompt reward_model.ground_truth", _chat_prompt),
    ("Question Answer Numbers Equation", _masked),
    ("Question Answer Body", _svamp),
    ("Question Answer", None),  # AIME
    ("question final_answer", None),  # DeepMath
    ("problem answer solution", None),  # MATH
    ("problem solution", _boxed_solution),
    ("problem answer", None),
    ("question answer", None),  # GSM8K
    ("prompt answer", None),
    ("input target", _mawps),
)


def find_format(columns: Collection[str]) -> tuple[str, str, Reader] | None:
    """(question's column, gold answer's, reader) of the row format with these columns."""
    for names, read in ROW_FORMATS:
        question, answer, *others = names.split()
        if {name.partition(".")[0] for name in names.split()} <= set(columns):
            solution = "solution" if "solution" in others else None
            return question, answer, read or partial(_solved, question, answer, solution)
    return None


def parse_rows(
    raws: Iterable[Raw],
    where: str,
    question: str | None = None,
    answer: str | None = None,
    list_answers: ListAnswers | None = None,
) -> list[DataRow]:
    """Reads rows by the given columns, or by the row format that their columns identify.

    Args:
        raws: raw rows.
        where: the source, for error messages.
        question: the question's column (`a.b`: field b of object a, `a.0`: item 0 of list a); None:
            by row format.
        answer: the gold answer's column; None: by row format.
        list_answers: meaning of a list of answers; None: see this module's docstring.

    Raises:
        UserError: no row format fits, a given column is missing, or a question or gold answer is an
            object or bytes.
    """
    raws = [unpack(raw, f"{where}, row {index}") for index, raw in enumerate(raws)]
    columns = {str(column) for raw in raws for column in raw}
    check_named(raws, where, question, answer)
    found = find_format(columns)
    if found is None and (question is None or answer is None):
        raise UserError(
            f"{where}: no question and gold answer among its columns "
            f"({', '.join(sorted(columns)) or 'none'}); name both: {COLUMN_KEYS}"
        )
    rows = []
    for index, raw in enumerate(raws):
        full = {**dict.fromkeys(sorted(columns)), **raw}
        try:
            row = _read(full, found, question, answer)
        except UserError as error:
            raise UserError(f"{where}, row {index}: {error}") from error
        is_multiple = str(raw.get("is_multiple_answer")).lower() == "true"
        if row.reference and (list_answers or ("all" if is_multiple else "any")) == "all":
            row = replace(row, reference=as_one(row.reference))
        tolerance = _tolerance(raw, f"{where}, row {index}")
        if row.reference and tolerance is not None:
            row = replace(row, reference=with_tolerance(row.reference, tolerance))
        rows.append(replace(row, row=index, columns=full))
    return rows


def _read(
    raw: Raw, found: tuple[str, str, Reader] | None, question: str | None, answer: str | None
) -> DataRow:
    """One row: what the user has named, the rest by the row format."""
    own_question, own_answer, read = found or (None, None, lambda _: DataRow("", None))
    for key, column in (("question", question or own_question), ("answer", answer or own_answer)):
        if column:
            check_text(reach(raw, column), key, column)
    row = read(raw)
    if question is not None:
        row = problem(reach(raw, question), row.reference, row.solution)
    if answer is not None:
        value = reach(raw, answer)
        row = replace(row, reference=final_answer(value), solution=_worked(value))
    return row


_SIZE = re.compile(r"(?:\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?)?")


def _tolerance(raw: Raw, where: str) -> str | None:
    """OlympiadBench's `error`; None if the row has none. Raises UserError for other text."""
    text = "" if raw.get("error") is None else number_text(raw["error"]).strip()
    if "is_multiple_answer" not in raw or not text or text == "nan":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(_SIZE.fullmatch(part) for part in parts):
        raise UserError(
            f"{where}: column error is {text!r}, not a tolerance; write the largest difference "
            "that counts as right, such as 0.1, or leave it empty"
        )
    if "" in parts:
        return None
    smallest = min(map(Decimal, parts))
    return str(smallest) if smallest > 0 else None
