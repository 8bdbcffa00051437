"""The report's data: what is read, sampled, converted and compared, without a browser."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest

from rl_lora.cli import main
from rl_lora.commands.report import write_report
from rl_lora.errors import UserError
from rl_lora.report.blocks import DARK, LIGHT, moving
from rl_lora.report.build import build_page
from rl_lora.report.live import LiveReport, make_server
from rl_lora.report.maths import MAX_CHARS, find_formulas, to_tree
from rl_lora.report.records import read_run, read_runs, thinned
from rl_lora.report.summary import make_tiles, settings_section
from rl_lora.report.text import Formulas, segments, visible
from rl_lora.report.transcripts import CutText, sample_transcripts, stream_objects
from tests.helpers.report_runs import (
    SCRIPT,
    step_metrics,
    transcript,
    write_evaluation,
    write_lines,
    write_run,
)


def figures_of(*folders: Path) -> dict[str, Any]:
    page, _ = build_page(folders)
    return {figure.id: figure for section in page.sections for figure in section.figures}


def plain(value: Any) -> Any:
    """A figure's part with colours that plotly knows in place of the palette's names."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    is_name = isinstance(value, str) and re.fullmatch(r"(c\d|ink|muted)(@[\d.]+)?", value)
    return "#000000" if is_name else value


# --- figures ---


def test_every_figure_is_valid_for_plotly(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", num_steps=3)
    single, both = figures_of(first), figures_of(first, second)
    wanted = {
        "reward",
        "reward_by_source",
        "evaluation_held_out",
        "evaluation_held_out_by_source",
        "length",
    }
    wanted |= {"groups", "statuses", "kl", "ratio", "entropy", "time", "speed", "memory"}
    assert set(single) == wanted
    left_out = {"reward_by_source", "evaluation_held_out_by_source", "statuses"}
    by_source = {"evaluation_held_out_source_0", "evaluation_held_out_source_1"}
    assert set(both) == wanted - left_out | by_source
    for figure in [*single.values(), *both.values()]:
        plotly.graph_objects.Figure(plain(figure.data), plain(figure.layout))  # raises on errors


def test_the_terms_of_a_reward_are_curves_and_part_of_a_transcript(tmp_path: Path) -> None:
    terms = {"reward/math/mean": 0.5, "reward/short/mean": -2.0, "reward/short/mean/sums": -3.0}
    folder = write_run(tmp_path / "a")
    records = [{**step_metrics(step), **terms} for step in (1, 2)]
    write_lines(folder / "metrics.jsonl", records)
    figure = figures_of(folder)["reward_by_term"]
    assert [(trace["name"], trace["y"]) for trace in figure.data] == [
        ("math", [0.5, 0.5]),
        ("short", [-2.0, -2.0]),
    ]
    scored: dict[str, Any] = {"math": 1.0, "short": -2.0, "x\n": None, "y": [3]}
    scored |= {str(number): 1 for number in range(99)}
    write_lines(folder / "transcripts.jsonl", [transcript(1, 0, "so 3", terms=scored)])
    (record,) = [r for r in sample_transcripts([read_run(folder)]).records if r["step"] == 1][:1]
    assert record["terms"][:2] == [("math", 1.0), ("short", -2.0)]
    assert len(record["terms"]) == 18  # of the first 20, those that are numbers


def test_evaluation_figure_has_the_results_and_their_intervals(tmp_path: Path) -> None:
    data = figures_of(write_run(tmp_path / "a"))["evaluation_held_out"].data
    area, line = data[:2]
    assert (line["x"], line["y"]) == ([0, 10], [0.1, 0.4])
    assert (area["x"], area["y"]) == ([0, 10, 10, 0], [0.15, 0.45, 0.35, 0.05])
    base = next(trace for trace in data if trace.get("name") == "base model")
    assert base["y"] == [0.05, 0.05]


def test_moving_mean_and_spread() -> None:
    means, spreads = moving([0.0, 3.0, 6.0], 1)
    assert means == [1.5, 3.0, 4.5]
    assert spreads[1] == pytest.approx((2 * 9 / 3) ** 0.5)


def test_long_runs_are_averaged_and_say_so(tmp_path: Path) -> None:
    records, size = thinned([{"step": s, "a": float(s)} for s in range(1, 7)], 3)
    assert (size, records) == (2, [{"step": s, "a": s} for s in (1.5, 3.5, 5.5)])
    figure = figures_of(write_run(tmp_path / "long", num_steps=1500))["reward"]
    assert len(figure.data[-1]["x"]) == 750
    assert "mean of 2 steps" in figure.note


def test_colours_have_contrast_in_both_themes() -> None:
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for palette in (LIGHT, DARK):
        for name, needed in {**{f"c{i}": 3.0 for i in range(7)}, "ink": 7, "muted": 4.5}.items():
            for ground in (palette["card"], palette["page"]):
                low, high = sorted((luminance(palette[name]), luminance(ground)))
                assert (high + 0.05) / (low + 0.05) >= needed, (name, ground)


# --- records, tiles, settings ---


def test_tiles_and_settings(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a"))
    tiles = {tile.label: tile for tile in make_tiles(run)}
    assert tiles["Policy"].value == "LoRA rank 8"
    assert tiles["Steps"].value == "12 of 20"
    assert tiles["Held-out accuracy"].value == "10.0% → 40.0%"
    assert "+30.0 points" in tiles["Held-out accuracy"].detail
    changed = settings_section([run]).tables[0].rows
    assert changed == [
        ["run.name", "a", "run"],
        ["run.num_steps", "20", "100"],
        ["lora.rank", "8", "1"],
    ]


def test_a_run_at_step_0_and_a_killed_one(tmp_path: Path) -> None:
    early = tmp_path / "early"
    early.mkdir()
    (early / "run.json").write_text("{}")
    page, _ = build_page([early])
    assert "early has not finished a step yet" in page.notes
    killed = write_run(tmp_path / "killed")
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        with (killed / name).open("a") as file:
            file.write('{"step": 13, "reward/me')
    (killed / "eval" / "step_000011.json").write_text("{")
    page, _ = build_page([killed])
    assert page.tiles[2].value == "12 of 20"
    assert any("step_000011.json is not an evaluation result" in note for note in page.notes)


def test_a_run_of_an_earlier_version_says_what_was_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "a")
    assert read_run(folder).notes == []
    write_lines(folder / "metrics.jsonl", [{"step": 1, "rollouts/age_max": 0.0}])
    (folder / "figures").mkdir()
    (folder / "figures" / "exams.png").touch()
    note = (
        "written by an earlier version: rollouts/age_* of metrics.jsonl is rollouts/staleness_* "
        "now; figures/exams.png is figures/evaluations.png now"
    )
    assert read_run(folder).notes == [note]
    assert note in build_page([folder])[0].notes
    assert main(["status", str(folder)]) == 0
    assert note in " ".join(capsys.readouterr().out.split())


def test_a_folder_without_a_run_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent"), "--watch"]) == 2
    folder = write_run(tmp_path / "a")
    with pytest.raises(UserError, match="given twice"):
        read_runs([folder, folder / ".." / "a"])
    with pytest.raises(UserError, match="choose another file"):
        write_report([folder], tmp_path / "absent" / "report.html")


# --- transcripts ---


def test_sample_is_bounded_seeded_and_has_both_verdicts(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_run(folder, num_steps=2)
    write_lines(
        folder / "transcripts.jsonl",
        (transcript(step, i, f"{step} {i}") for step in (1, 2) for i in range(500)),
    )
    run = read_run(folder)
    sample = sample_transcripts([run], max_transcripts=40)
    assert sample.num_read == 1000
    for step in (1, 2):
        verdicts = [r["correct"] for r in sample.records if r["step"] == step]
        assert (verdicts.count(True), verdicts.count(False)) == (10, 10)
    again, other = (sample_transcripts([run], max_transcripts=40, seed=s) for s in (0, 1))
    assert again.records == sample.records
    assert other.records != sample.records


def test_more_steps_than_the_sample_may_have_are_skipped_evenly(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a", num_steps=100))
    sample = sample_transcripts([run], max_transcripts=50)
    assert len(sample.records) <= 50
    assert len({r["step"] for r in sample.records}) == 25
    assert sample.num_strata_skipped == 75


def test_gzip_torn_and_damaged_files(tmp_path: Path) -> None:
    rows = [json.dumps({"n": n, "text": "x" * 100}) + "\n" for n in range(3)]
    members = b"".join(gzip.compress(row.encode()) for row in rows)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(members[:-20])
    assert [row["n"] for row in stream_objects(path) if row] == [0, 1]
    plain_path = tmp_path / "a.jsonl"
    plain_path.write_bytes(b'{"n": 1}\n\x00\x00\n[1]\n' + b"[" * 9999 + b'\n{"n": 2}\n{"n": 3')
    assert list(stream_objects(plain_path)) == [{"n": 1}, None, None, None, {"n": 2}]


def test_evaluation_rows_of_both_kinds_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    row: dict[str, Any] = {"prompt_id": "p", "source": "sums", "question": "q", "reference": "3"}
    row["samples"] = [{"completion": f"c{i}", "correct": i == 0, "tokens": 3} for i in range(2)]
    write_lines(folder / "eval" / "base.jsonl", [row])
    (folder / "eval" / "step_000010.jsonl.gz").write_bytes(
        gzip.compress((json.dumps(row) + "\n").encode())
    )
    sample = sample_transcripts([read_run(folder)])
    found = [(r["origin"], r["step"]) for r in sample.records if r["origin"] != "training"]
    assert sorted(found, key=str) == [("base", None)] * 2 + [("step_000010", 10)] * 2


def test_an_episodes_turns_are_shown_one_under_the_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    hostile = "[environment]\n<script>x</script>\x1b[2J"
    turns: list[Any] = [
        ["<calc>1+2</calc>", "<result>3</result>", "So 3."],
        ["So 3."],  # as without an environment
        "no list",
        [hostile, 7, "a" * 999_999],
    ]
    rows = [transcript(1, i, "So 3.", turns=one) for i, one in enumerate(turns)]
    write_lines(folder / "transcripts.jsonl", rows)
    found = [r["completion"] for r in sample_transcripts([read_run(folder)]).records]
    shown = [text for text in found if "turn 1" in text.head]
    assert (
        CutText(
            "[turn 1]\n<calc>1+2</calc>\n\n[environment]\n<result>3</result>\n\n[turn 2]\nSo 3."
        )
        in shown
    )
    assert found.count(CutText("So 3.")) >= 2
    (long,) = (text for text in shown if text.num_cut)
    assert long.head.startswith(f"[turn 1]\n{hostile}\n\n[environment]\n7\n\n[turn 2]\naaa")
    page = write_report([folder]).read_text()
    assert "<script>x" not in page
    assert "\x1b" not in page


def test_long_texts_keep_both_ends() -> None:
    text = CutText("a" * 10 + "b" * 999_980 + "c" * 10)
    cut = text.cut(10, 10)
    assert (cut.head, cut.num_cut, cut.tail) == ("a" * 10, 999_980, "c" * 10)
    again = cut.cut(4, 3)
    assert (again.head, again.num_cut, again.tail) == ("aaaa", 999_993, "ccc")
    assert CutText("short").cut(3, 2) == CutText("short")


# --- hostile text ---


def test_hidden_characters_are_marked_and_counted() -> None:
    assert visible("a\x00\x00b\n\u202ec\ud800") == [
        "a", {"h": "U+0000", "n": 2}, "b\n", {"h": "U+202E", "n": 1}, "c", {"h": "U+D800", "n": 1}
    ]  # fmt: skip
    assert visible("plain é ∑ text") == ["plain é ∑ text"]


def test_formulas_are_found_and_prices_are_not() -> None:
    text = r"$x$ \(y\) \[z\] $$w$$ \boxed{1}"
    found = [(latex, shown) for *_, latex, shown in find_formulas(text)]
    assert found == [("x", False), ("y", False), ("z", True), ("w", True), (r"\boxed{1}", False)]
    assert list(find_formulas("it costs $5 and $6, or $ 7 $")) == []
    assert list(find_formulas(r"\boxed{" * 500)) == []


def test_formulas_have_only_allowed_names() -> None:
    tree = to_tree(r"\href{javascript:alert(1)}{x} \text{<script>alert(1)</script>} \color{red}{y}")
    text = json.dumps(tree)
    assert "javascript" not in text
    assert "red" not in text
    assert "<script>alert(1)</script>" in text  # as characters of an mtext
    inequality = to_tree(r"a < b")
    assert inequality is not None
    assert inequality[2][2:] == [["mi", {}, "a"], ["mo", {}, "<"], ["mi", {}, "b"]]
    assert "mfrac" in json.dumps(to_tree(r"\frac{1}{2}"))


@pytest.mark.parametrize(
    "latex",
    [
        "x" * (MAX_CHARS + 1),
        "{" * 100 + "}" * 100,
        r"\newcommand{\a}{xxxxxxxxxx}\a",
        r"\def\a{\b\b}\a",
        r"\frac{1}{",
        r"\left(",
    ],
)
def test_text_that_is_not_a_formula_stays_text(latex: str) -> None:
    start = time.perf_counter()
    assert to_tree(latex) is None
    assert time.perf_counter() - start < 5
    result = segments(CutText(f"${latex}$"), Formulas())
    assert "".join(result) == f"${latex}$"


# --- the file and the server ---


def test_the_file_has_hostile_text_packed_and_forbids_connections(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    path = write_report([folder])
    html = path.read_text()
    assert path == folder / "report.html"
    assert SCRIPT not in html
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "connect-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,"]  # the icon: none
    assert path.stat().st_size < 2_500_000


def test_several_runs_go_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(first), str(second)]) == 0
    assert (tmp_path / "report.html").is_file()
    assert "report.html" in capsys.readouterr().out


def test_the_server_follows_the_run_and_answers_no_other_host(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    report = LiveReport([folder])
    server = make_server(report, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"  # other machines cannot reach it
    address = f"http://127.0.0.1:{server.server_port}/"

    def get(path: str, **headers: str) -> bytes:
        request = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    try:
        before = get("version")
        assert before.decode() in get("").decode()
        assert not report.refresh()  # nothing has changed
        write_evaluation(folder, "step_000012", 12, 90)
        deadline = time.monotonic() + 60
        while not report.refresh() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert get("version") != before
        tiles = {tile["label"]: tile["value"] for tile in json.loads(get("data"))["tiles"]}
        assert tiles["Held-out accuracy"] == "10.0% → 90.0%"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get("data", Host="evil.example")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("../run.json")
        with pytest.raises(UserError, match="choose another with --port"):
            make_server(report, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
