"""The report in a real, headless Chromium: drawn, filtered, hostile, large, live."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl_lora.commands.report import write_report
from rl_lora.report.live import LiveReport, make_server
from rl_lora.storage import jsonl
from tests.helpers.report_runs import (
    step_metrics,
    transcript,
    write_evaluation,
    write_lines,
    write_run,
)

pytest.importorskip("playwright", reason="needs playwright (extra: dev)")
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs a Chromium on the PATH (Debian: apt-get install chromium)"
)
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "is_mobile": True,
    "has_touch": True,
}
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # No sandbox: the tests may run as root, in a container; the pages are our own.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([write_run(tmp_path_factory.mktemp("runs") / "hostile")])


class Complaints(list[str]):
    """What the console says, what is thrown, and what is asked of a network."""


def open_page(browser: Browser, address: str, **settings: Any) -> tuple[Page, Complaints]:
    page = browser.new_context(**{**DESKTOP, **settings}).new_page()
    complaints = Complaints()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda request: complaints.append(request.url) if request.url != address else None,
    )
    page.goto(address)
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    return page, complaints


def counts(page: Page) -> tuple[int, int]:
    """(correct, wrong) transcripts that fit the filters."""
    texts = page.locator(".column > h3").all_inner_texts()
    correct, wrong = (int(text.split("(")[1].rstrip(")").replace(",", "")) for text in texts)
    return correct, wrong


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_everything_is_drawn_without_a_complaint(
    browser: Browser, report: Path, screen: dict[str, Any], scheme: str
) -> None:
    page, complaints = open_page(browser, report.as_uri(), color_scheme=scheme, **screen)
    cards = page.locator(".card.figure").all()
    assert len(cards) == 13
    for card in cards:
        assert card.locator(".main-svg .trace, .main-svg .bars").count() > 0
    assert complaints == []
    assert page.locator("#message").is_hidden()
    width = screen["viewport"]["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(245, 247, 249)", "dark": "rgb(18, 22, 27)"}[scheme]
    assert page.locator(".tile .value").all_inner_texts()[1:4] == [
        "LoRA rank 8", "12 of 20", "10.0% → 40.0%"
    ]  # fmt: skip


def test_hostile_text_is_shown_and_does_not_run(browser: Browser, report: Path) -> None:
    page, complaints = open_page(browser, report.as_uri())
    while page.locator(".more").count():
        page.locator(".more").first.click()
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator("#sections script, #sections img, #sections a, [href*=javascript]").count()
        == 0
    )
    text = page.locator("#transcripts").inner_text()
    assert "<script>window.hacked = 1</script><img src=x onerror=" in text
    assert "U+0000 × 3" in text
    assert "U+202E" in text
    assert "\x00" not in text
    assert page.locator("math mfrac").count() > 0
    assert page.locator("math .boxed").count() > 0
    page.locator("#raw").check()
    assert page.locator("math").count() == 0
    assert r"\frac{1}{2} < x" in page.locator("#transcripts").inner_text()
    assert complaints == []


def test_filters(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report.as_uri())
    assert counts(page) == (24, 72)  # 12 steps of 8, a quarter correct
    page.select_option("[data-filter=source]", "words")
    assert counts(page) == (0, 48)  # the correct ones are of even index, all 'sums'
    page.select_option("[data-filter=source]", "")
    page.fill("[data-filter=from]", "3")
    page.fill("[data-filter=to]", "4")
    assert counts(page) == (4, 12)
    page.fill("[data-filter=longest]", "11")
    assert counts(page) == (2, 2)
    page.locator("#reset").click()
    page.select_option("[data-filter=verdict]", "wrong")
    assert counts(page) == (0, 72)
    page.select_option("[data-filter=verdict]", "")
    page.fill("[data-filter=search]", "BELL")
    assert sum(counts(page)) == 24
    page.locator("#reset").click()
    page.locator(".meta button").first.click()
    assert counts(page) == (12, 0)  # one of the correct problems, in each of 12 steps
    page.locator("#problem-filter").click()
    assert counts(page) == (24, 72)


def test_phone_shows_one_verdict_at_a_time(browser: Browser, report: Path) -> None:
    page, _ = open_page(browser, report.as_uri(), **PHONE)
    correct, wrong = page.locator(".column.correct"), page.locator(".column.wrong")
    assert (correct.is_visible(), wrong.is_visible()) == (True, False)
    page.locator(".tabs button").nth(1).click()
    assert (correct.is_visible(), wrong.is_visible()) == (False, True)


def test_several_runs_are_overlaid(browser: Browser, tmp_path: Path) -> None:
    ranks = {"a": 1, "b": 4}
    folders = [write_run(tmp_path / name, lora={"rank": rank}) for name, rank in ranks.items()]
    path = write_report(folders, tmp_path / "report.html")
    page, complaints = open_page(browser, path.as_uri())
    legend = page.locator("#figure-reward .legendtext").all_text_contents()
    assert legend == ["a", "b"]
    page.select_option("[data-filter=run]", "1")
    assert counts(page) == (24, 72)
    assert complaints == []


def test_live_page_keeps_filters_and_scroll(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    live = LiveReport([folder])
    server = make_server(live, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page, complaints = open_page(browser, f"http://127.0.0.1:{server.server_port}/")
        page.select_option("[data-filter=source]", "words")
        page.evaluate("window.scrollTo(0, 700)")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(jsonl.to_line(step_metrics(13)))
        write_evaluation(folder, "step_000012", 12, 80)
        deadline = time.monotonic() + 60
        while not live.refresh() and time.monotonic() < deadline:
            time.sleep(0.05)
        page.locator("#tiles", has_text="13 of 20").wait_for(timeout=60_000)
        assert "10.0% → 80.0%" in page.locator("#tiles").inner_text()
        assert page.evaluate("window.scrollY") == 700
        assert page.locator("[data-filter=source]").input_value() == "words"
        assert counts(page) == (0, 48)
        assert [line for line in complaints if "127.0.0.1" not in line] == []
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.long
def test_100_steps_and_100_000_transcripts(browser: Browser, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "large", num_steps=100)
    rng = random.Random(0)
    words = [f"{rng.getrandbits(40):x}" for _ in range(50_000)]

    def completion(index: int) -> str:
        if index % 20_000 == 7:
            return "\x00" * 500_000 + "w " * 250_000
        return " ".join(rng.choices(words, k=120 if index % 10 else 1200))

    write_lines(
        folder / "transcripts.jsonl",
        (transcript(1 + i // 1000, i, completion(i)) for i in range(100_000)),
    )
    path = write_report([folder])
    assert path.stat().st_size < 5_000_000
    page, complaints = open_page(browser, path.as_uri())
    assert "1,200 of the 100,000 transcripts" in page.locator("#transcripts").inner_text()
    start = time.monotonic()
    page.fill("[data-filter=search]", "u+0000")
    page.fill("[data-filter=search]", "")
    page.fill("[data-filter=from]", "50")
    assert counts(page) == (306, 306)
    assert time.monotonic() - start < 5
    assert complaints == []
