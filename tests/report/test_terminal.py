"""What is printed on a terminal, in a file and in quiet; hostile text; the closing tables."""

import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from rl_lora.config import EvalSection
from rl_lora.evaluation.files import read_evaluation
from rl_lora.evaluation.paired import PairedScores, paired_scores
from rl_lora.evaluation.scores import EvalResult
from rl_lora.report.tables import (
    evaluation_table,
    paired_line,
    phase_table,
    printable,
    seconds_text,
)
from rl_lora.report.terminal import (
    Display,
    step_line,
)
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt

METRICS = {
    "reward/mean": 0.4312,
    "reward/correct_mean": 0.3125,
    "cot/tokens_mean": 54.4,
    "cot/truncated_rate": 0.021,
    "mismatch/kl": 3.1e-7,
    "speed/sample_tokens_per_s": 1234.5,
    "time/step_s": 12.34,
}


def make_console(is_terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=is_terminal, width=120, highlight=False), file


def evaluation_of(texts: Sequence[str], sources: Sequence[str] = ("sum",)) -> EvalResult:
    prompts = [
        make_prompt(f"p/{index}", source=sources[index % len(sources)])
        for index in range(len(texts))
    ]
    sampler = FakeSampler({f"p/{index}": [text] for index, text in enumerate(texts)})
    return evaluate(sampler, prompts, FakeReward(), EvalSection(), max_tokens=64, seed=0)


def paired_of(first: Sequence[str], second: Sequence[str]) -> PairedScores:
    problems = []
    for texts in (first, second):
        sampler = FakeSampler({f"p/{index}": [text] for index, text in enumerate(texts)})
        prompts = [make_prompt(f"p/{index}") for index in range(len(texts))]
        with tempfile.TemporaryDirectory() as folder:
            evaluate(
                sampler,
                prompts,
                FakeReward(),
                EvalSection(),
                max_tokens=64,
                seed=0,
                folder=Path(folder),
            )
            problems.append(read_evaluation(Path(folder) / "eval.jsonl.gz")[1])
    return paired_scores(list(zip(*problems, strict=True)))


BEFORE = evaluation_of(["7"] * 4 + ["8"] * 36)
AFTER = evaluation_of([r"\boxed{7}"] * 20 + [r"\boxed{8}"] * 20)
PAIRED = paired_of(["7"] * 4 + ["8"] * 36, ["7"] * 20 + ["8"] * 20)


def has_control_characters(text: str) -> bool:
    return any(ord(character) < 32 and character != "\n" for character in text)


# --- texts ----------------------------------------------------------------------------------------


def test_printable_shows_what_could_act_on_a_terminal() -> None:
    assert printable("\x1b[31mred\x07") == "\\x1b[31mred\\x07"
    assert printable("a\r\n\tb\x00\x7f\x9b") == "a\\r\\n\\tb\\x00\\x7f\\x9b"
    assert printable("\ud800 \u202e \u2028 \u200b") == "\\ud800 \\u202e \\u2028 \\u200b"
    assert printable("é 中 [bold]") == "é 中 [bold]"
    assert printable("abcdef", max_chars=4) == "abc…"
    assert printable("abcd", max_chars=4) == "abcd"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7622, "2 h 07 min"),
    ],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_step_line_shows_what_is_there() -> None:
    assert step_line(METRICS) == (
        "reward 0.431  correct 31.2%  length 54  truncated 2%  kl 3.1e-07  1234 tok/s  12.3 s"
    )
    assert step_line({"sft/loss": 1.25, "eval/accuracy": 0.5}) == "loss 1.250  held-out 50.0%"
    assert step_line({"mismatch/kl": float("nan")}) == "kl nan"


# --- lines and bar --------------------------------------------------------------------------------


def run_two_steps(display: Display) -> None:
    with display:
        display.note("loaded \x1b[31m[bold]x[/bold]")
        display.stage("training", num_steps=2)
        for done in (0, 1, 2):
            display.evaluation(done, 2, min(1, 2 - done))
        display.step(1, METRICS)
        display.step(2, METRICS)
        display.evaluation_result("before", BEFORE)


def test_a_file_gets_one_plain_line_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    console, file = make_console(is_terminal=False)
    with Display(console=console) as display:
        display.stage("training", num_steps=12, done=9)
        now[0] += 100
        display.step(10, METRICS)
        now[0] += 50
        display.step(11, METRICS)
        display.step(12, {"reward/mean": 0.5})
    lines = file.getvalue().splitlines()
    assert lines[0] == f"training 10/12  {step_line(METRICS)}  3 min 20 s left"
    assert lines[1].endswith("  1 min 30 s left")  # 0.8 * 100 + 0.2 * 50
    assert lines[2:] == ["training 12/12  reward 0.500"]


def test_a_file_gets_a_line_of_a_long_evaluation_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    console, file = make_console(is_terminal=False)
    with Display(console=console) as display:
        for done in range(0, 101, 10):
            display.evaluation(done, 100, 10)
            now[0] += 12
    assert file.getvalue().splitlines() == [
        "evaluation 30/100  1 min 24 s left",
        "evaluation 60/100  48 s left",
        "evaluation 90/100  12 s left",
    ]


def test_sampling_shows_its_speed_within_a_long_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    console, file = make_console(is_terminal=False)
    with Display(console=console) as display:
        display.sampling(0, 8, 0)
        now[0] = 40.0
        display.sampling(2, 8, 800)  # 20 tokens a second; 6 of 8 at 20 s each two... 120 s
        now[0] = 50.0
        display.sampling(8, 8, 3000)
        display.evaluation(0, 4, 2)
        now[0] = 90.0
        display.sampling(1, 2, 400)  # half of the two problems being sampled: 1 of 4 in 40 s
    assert file.getvalue().splitlines() == [
        "sampling 2/8  20 tok/s  2 min 00 s left",
        "evaluation 1/4  10 tok/s  2 min 00 s left",
    ]


def test_a_file_gets_no_control_characters() -> None:
    console, file = make_console(is_terminal=False)
    run_two_steps(Display(console=console))
    text = file.getvalue()
    assert not has_control_characters(text)
    assert text.splitlines()[0] == "loaded \\x1b[31m[bold]x[/bold]"
    assert text.splitlines()[-1].startswith("before: accuracy 10.0% (2.8 to 23.7), format 0.0%")
    assert len(text.splitlines()) == 4


def test_a_terminal_gets_the_bar_and_the_lines() -> None:
    console, file = make_console(is_terminal=True)
    run_two_steps(Display(console=console))
    text = file.getvalue()
    assert "training 2/2  reward 0.431" in text
    assert "━" in text
    assert "loaded \\x1b[31m[bold]x[/bold]" in text  # shown, not obeyed
    assert text.endswith("\x1b[?25h")  # the cursor is back


def test_quiet_shows_only_warnings_and_the_summary() -> None:
    for is_terminal in (False, True):
        console, file = make_console(is_terminal)
        display = Display(quiet=True, console=console)
        run_two_steps(display)
        assert file.getvalue() == ""
        display.warn("two rows without an answer")
        assert "warning: two rows without an answer\n" in file.getvalue()
        display.summary({"before": BEFORE}, {"before to after": PAIRED}, {"sample": 1.0})
        assert "before to after: accuracy +40.0 points" in file.getvalue()


def test_a_long_line_in_a_file_is_not_wrapped() -> None:
    console, file = make_console(is_terminal=False)
    Display(console=console).note("x" * 500)
    assert file.getvalue() == "x" * 500 + "\n"


def test_an_ascii_output_takes_any_text() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Display(console=Console(file=file, width=80)).note("π = 3")
    file.flush()
    assert raw.getvalue() == b"\\u03c0 = 3\n"


# --- summary --------------------------------------------------------------------------------------


def printed(display_width: int, *tables: object) -> str:
    file = io.StringIO()
    console = Console(file=file, width=display_width)
    for table in tables:
        console.print(table)
    return file.getvalue()


def test_evaluation_table_shows_accuracy_and_format_apart() -> None:
    text = printed(120, evaluation_table({"before": BEFORE, "after": AFTER}))
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in re.split("[│]", line)[1:-1]]) == 3
    }
    assert rows["accuracy"] == ["10.0% (2.8 to 23.7)", "50.0% (33.8 to 66.2)"]
    assert rows["in the requested format"] == ["0.0%", "100.0%"]
    assert rows["accuracy within the format"] == ["-", "50.0%"]
    assert rows["problems"] == ["40", "40"]
    assert "95% intervals" in text


def test_evaluation_table_by_source() -> None:
    result = evaluation_of(["7", "8", "7", "8"], sources=("aime24", "[red]evil\x1b[0m"))
    text = printed(120, evaluation_table({"after": result}))
    assert "aime24: accuracy" in text
    assert "100.0% (15.8 to 100.0)" in text
    assert "[red]evil\\x1b[0m: accuracy" in text


def test_summary_with_the_base_model_compares_both(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        evaluations = {"base model": BEFORE, "before": BEFORE, "after": AFTER}
        pairs = {"base model to after": PAIRED, "before to after": PAIRED}
        display.summary(evaluations, pairs, {"sample": 30.0, "learn": 10.0})
        display.summary({}, {}, {})
        display.evaluations({"aime24": AFTER})
    text = capsys.readouterr().out
    assert not has_control_characters(text)
    assert text.isascii()
    assert re.search(r"\| +base model \| +before \| +after \|", text)
    assert text.count("Held-out problems") == 2
    assert re.search(r"\| +aime24 \|", text)
    assert "base model to after: accuracy +40.0 points" in text
    assert "before to after: accuracy +40.0 points" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_paired_line() -> None:
    assert re.fullmatch(
        r"accuracy \+40\.0 points \(\+25\.0 to \+55\.0\), 16 problems won, 0 lost, p 3\.1e-05",
        paired_line(PAIRED),
    )
    nothing = paired_of(["8"] * 4, ["8"] * 4)
    # The exact upper limit for 0 of 4 is 1 - 0.025^(1/4) = 60.2 %.
    assert paired_line(nothing).startswith("accuracy +0.0 points (-60.2 to +60.2), 0 problems won")


def test_phase_table_has_shares_and_the_sum() -> None:
    text = printed(80, phase_table({"learn": 10.0, "sample": 30.0}))
    cells = [re.findall(r"[\w.%]+", line) for line in text.splitlines()]
    assert cells.index(["sample", "30.0", "75%"]) < cells.index(["learn", "10.0", "25%"])
    assert ["sum", "40.0"] in cells
