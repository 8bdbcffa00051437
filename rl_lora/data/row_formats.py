r"""Data-set rows as they come -> question, gold answer, worked solution.

A row format is known by its columns. The gold answer is the final answer alone: what follows
'####', the content of the last balanced \boxed{}, or the answer column; None where a row has none.

A list of answers is one of alternatives, any of which counts ("any"), or one answer of several
values, all of which are needed ("all"). A source's `list_answers` says which. Where it does not:
"all" in rows whose column is_multiple_answer is true (OlympiadBench, arXiv 2402.14008), else "any".

OlympiadBench's column `error` holds the largest difference that counts as right ("1e-1"; "" or null
for none) and becomes the reference's tolerance. Of several ("0.1,0.02", one a value) the smallest
counts for all; a blank among them means exact, and then none is taken.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal

from rl_lora.data.columns import Raw, check_text, explain_missing, parsed, reach, unpack
from rl_lora.data.messages import Message, as_turns, read_messages
from rl_lora.data.references import alternatives, join_alternatives, with_tolerance
from rl_lora.errors import UserError


@dataclass(frozen=True, slots=True)
class DataRow:
    """One problem of a data set, before rendering.

    Example: DataRow(question="What is 4 + 3?", reference="7", solution="4 + 3 = 7", row=17)
    """

    question: str  # "" where the row has none
    reference: str | None  # the final answer (`references`); None: the row has no gold answer
    solution: str = ""  # worked solution, not necessarily ending in the asked format
    row: int = 0  # position in the source, from 0
    # The whole conversation where there is more than the question: system message, earlier turns;
    # its last user message is the question.
    messages: tuple[Message, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as read

    def asked(self, *, with_system: bool) -> str:
        """All that is asked, earlier turns and question, for telling problems apart."""
        shown = [one for one in self.messages if with_system or one.role != "system"]
        return "\n".join(one.content or "" for one in shown) or self.question


ListAnswers = Literal["any", "all"]
Reader = Callable[[Raw], DataRow]


# --- text helpers ---------------------------------------------------------------------------------


def last_boxed(text: str) -> str | None:
    r"""Content of the last balanced \boxed{...} (or `\boxed 7`); None without one."""
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
    """An answer column's value as text, a list's items as alternatives; None for null, NaN, blank.

    A list within a list is one answer of several values.
    """
    if (items := _list_items(value)) is not None:
        parts = [gold_text(item) for item in items]
        return join_alternatives([as_one(part) for part in parts if part]) or None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = number_text(value).strip()
    # AIME answers, 0 to 999, come as "025" in some files; the gold answer is the integer.
    return str(int(text)) if re.fullmatch(r"0\d{1,2}", text) else text or None


def as_one(reference: str) -> str:
    """The alternatives as one answer of several values. Example: "3 ||| -3" -> "3, -3"."""
    return ", ".join(alternatives(reference))


def _list_items(value: Any) -> list[Any] | None:
    """The items of a list, or of a JSON text of a list of texts (Skywork-OR1's '["4"]')."""
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str) and re.match(r'\s*\[\s*"', value):
        items = parsed(value)
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    return None


def final_answer(value: Any) -> str | None:
    """`gold_text` of what an answer text ends in: after '####', else in its last box."""
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
    """A row whose prompt column holds text or chat messages.

    Raises:
        UserError: a message that is not text.
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
    """The text of a question without its answer instruction."""
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
    """The SVAMP authors' csv files: number0, number1, ... stand for the column Numbers."""
    numbers = [_numeric(text) or "" for text in str(raw["Numbers"]).split()]

    def fill(match: re.Match[str]) -> str:
        index = int(match.group(1))
        return numbers[index] if index < len(numbers) else match.group()

    question = re.sub(r"\bnumber(\d+)\b", fill, _text(raw["Question"]))
    return DataRow(re.sub(r"\s+([,.?!])", r"\1", question), _numeric(raw["Answer"]))


def _numeric(value: Any) -> str | None:
    """`gold_text`, and "51.0" of a csv file is 51 as well."""
    text = gold_text(value)
    if text is None or not re.fullmatch(r"-?\d*\.\d+|-?\d+\.", text):
        return text
    return number_text(float(text))


def _equation(equation: Any, gold: str | None) -> str:
    """'( 76.0 - 25.0 )' -> '76 - 25 = 51'."""
    text = re.sub(r"(\d+)\.0\b", r"\1", _text(equation))
    text = re.sub(r"^\( (.*) \)$", r"\1", text)  # every equation stands in brackets
    return f"{text} = {gold}" if text and gold is not None else ""


def _solved(question: str, answer: str, solution: str | None) -> Reader:
    """Question and answer columns; the box of the solution where the answer is null."""

    def read(raw: Raw) -> DataRow:
        text = _text(raw.get(solution)) if solution else ""
        gold = final_answer(raw.get(answer))
        if gold is None and text:
            gold = gold_text(last_boxed(text))
        solved = text or _worked(raw.get(answer))
        return problem(raw.get(question), gold, solved)

    return read


def _worked(value: Any) -> str:
    """The worked solution that an answer column may hold ("" if it holds the answer alone).

    GSM8K's calculator marks <<48/2=24>> and its last line '#### 72' are left out.
    """
    text = _text(value)
    if "####" in text:
        return re.sub(r"<<[^<>]*>>", "", text.rsplit("####", 1)[0]).strip()
    return text if last_boxed(text) is not None else ""


def _boxed_solution(raw: Raw) -> DataRow:
    solution = _text(raw["solution"])
    return problem(raw["problem"], gold_text(last_boxed(solution)), solution)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Rows with these columns are read so. Example: see ROW_FORMATS."""

    name: str
    question: str  # column
    answer: str  # column; `a.b` is field b of the object in column a
    read: Reader
    others: frozenset[str]  # columns that have to be there as well

    @property
    def columns(self) -> frozenset[str]:
        """All columns by which the row format is known."""
        return self.others | {self.question.split(".")[0], self.answer.split(".")[0]}


def _row_format(name: str, columns: str, read: Reader) -> RowFormat:
    """Columns: of the question, of the gold answer, others."""
    question, answer, *others = columns.split()
    return RowFormat(name, question, answer, read, frozenset(others))


# The first whose columns are all there is taken, so the narrower stand before the wider.
ROW_FORMATS: tuple[RowFormat, ...] = (
    _row_format("chat prompt", "prompt reward_model.ground_truth", _chat_prompt),
    _row_format("masked svamp", "Question Answer Numbers Equation", _masked),
    _row_format("svamp", "Question Answer Body", _svamp),
    _row_format("aime", "Question Answer", _solved("Question", "Answer", None)),
    _row_format("deepmath", "question final_answer", _solved("question", "final_answer", None)),
    _row_format("math", "problem answer solution", _solved("problem", "answer", "solution")),
    _row_format("math", "problem solution", _boxed_solution),
    _row_format("problem", "problem answer", _solved("problem", "answer", None)),
    _row_format("gsm8k", "question answer", _solved("question", "answer", None)),
    _row_format("prompt", "prompt answer", _solved("prompt", "answer", None)),
    _row_format("mawps", "input target", lambda raw: problem(
        raw["input"], _numeric(raw["target"])
    )),
)  # fmt: skip


def parse_rows(
    raws: Iterable[Raw],
    where: str,
    question: str | None = None,
    answer: str | None = None,
    list_answers: ListAnswers | None = None,
) -> list[DataRow]:
    """Rows read by the given columns, or by the row format that their columns tell.

    Args:
        raws: rows as the file has them.
        where: the source in words, for errors.
        question: column of the question (`a.b` reaches into an object, `a.0` into a list); None:
            by row format.
        answer: column of the gold answer; None: by row format.
        list_answers: what a list of answers means; None: as this module's head says.

    Raises:
        UserError: no row format fits, a given column is not there, or a question or gold answer is
        an
            object or bytes.
    """
    raws = [unpack(raw, f"{where}, row {index}") for index, raw in enumerate(raws)]
    columns = {str(column) for raw in raws for column in raw}
    read, row_format = _reader(columns, where, question, answer)
    for key, column in (("question", question), ("answer", answer)):
        if column is not None and all(reach(raw, column) is None for raw in raws):
            explain_missing(raws, column, key, where)
    if row_format is not None:
        question, answer = question or row_format.question, answer or row_format.answer
    rows = []
    for index, raw in enumerate(raws):
        full = {**dict.fromkeys(sorted(columns)), **raw}
        try:
            for key, column in (("question", question), ("answer", answer)):
                if column:
                    check_text(reach(raw, column), key, column)
            row = read(full)
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


_SIZE = re.compile(r"(?:\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?)?")


def _tolerance(raw: Raw, where: str) -> str | None:
    """OlympiadBench's `error`; None where the row has none. Raises UserError for other text."""
    text = "" if raw.get("error") is None else number_text(raw["error"]).strip()
    if "is_multiple_answer" not in raw or not text or text == "nan":
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(_SIZE.fullmatch(part) for part in parts):
        raise UserError(
            f"{where}: the column error holds {text!r}, which is no tolerance: write the largest "
            "difference that counts as right, such as 0.1, or leave it empty"
        )
    if "" in parts:
        return None
    smallest = min(map(Decimal, parts))
    return str(smallest) if smallest > 0 else None


def _reader(
    columns: set[str], where: str, question: str | None, answer: str | None
) -> tuple[Reader, RowFormat | None]:
    found = ", ".join(sorted(columns)) or "none"
    for key, column in (("question", question), ("answer", answer)):
        if column is not None and not {column, column.split(".")[0]} & columns:
            raise UserError(
                f"{where} has no column {column!r} (the data source's key {key!r}); "
                f"its columns: {found}"
            )
    row_format = next(
        (row_format for row_format in ROW_FORMATS if row_format.columns <= columns), None
    )
    if question is not None or answer is not None:
        if row_format is None and (question is None or answer is None):
            raise UserError(
                f"{where}: set both keys, question and answer, of the data source; "
                f"its columns: {found}"
            )
        return _mapped(question, answer, row_format), row_format
    if row_format is None:
        raise UserError(
            f"{where}: no question and gold answer among its columns ({found}); name them by "
            "data.train.question and data.train.answer (data.eval.… for an evaluation)"
        )
    return row_format.read, row_format


def _mapped(question: str | None, answer: str | None, row_format: RowFormat | None) -> Reader:
    def read(raw: Raw) -> DataRow:
        row = row_format.read(raw) if row_format else DataRow("", None)
        if question is not None:
            row = problem(reach(raw, question), row.reference, row.solution)
        if answer is not None:
            value = reach(raw, answer)
            row = replace(row, reference=final_answer(value), solution=_worked(value))
        return row

    return read
