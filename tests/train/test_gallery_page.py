"""The gallery: order, ranks, escapes, and the pictures it names."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from train.gallery_page import gallery_page
from train.report import COLUMNS

FIGURES: dict[str, dict[str, float | None]] = {
    "a": {"psnr": 20.0, "chamfer": 0.03},
    "b": {"psnr": 10.0, "chamfer": None},
    "c": {"psnr": 30.0, "chamfer": 0.01},
    "d": {"psnr": None, "chamfer": 0.02},
}
RECORDS: dict[str, dict[str, Any]] = {
    **{name: {"pictures": [["six views", f"gallery/{name} 1/six_views.png"]]} for name in FIGURES},
    "e": {"left_out": "too <thin>"},
}


def page(main: str = "psnr") -> str:
    rows = {"model": {"psnr": 20.0, "chamfer": 0.02}}
    return gallery_page("T & T", ["about"], rows, COLUMNS, RECORDS, FIGURES, main, {"a": 'a "cup" <1>'})


class Cards(HTMLParser):
    """What each card says, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cards: list[tuple[str, str, str]] = []  # name, kind, rank
        self.pictures: list[str] = []
        self.heading, self.rank, self.kind, self.inside = "", "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "article":
            self.kind, self.heading, self.rank = given.get("class") or "", "", ""
        elif tag == "img":
            self.pictures.append(str(given["src"]))
        self.inside = "rank" if given.get("class") == "rank" else tag

    def handle_data(self, data: str) -> None:
        if self.inside == "h2":
            self.heading += data
        elif self.inside == "rank":
            self.rank += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        if tag == "article":
            self.cards.append((self.heading.strip(), self.kind, self.rank))


def test_worst_first_and_unranked_last() -> None:
    assert Cards(page()).cards == [
        ("b", "worst", "worst, 1 of 3"),
        ("a", "typical", "typical, 2 of 3"),
        ("c", "best", "best, 3 of 3"),
        ("d", "", ""),
    ]
    assert [name for name, _, _ in Cards(page("chamfer")).cards] == ["a", "d", "c", "b"]
    # A main column that no object has: the first that is filled is taken.
    assert Cards(page("lpips")).cards == Cards(page()).cards


def test_names_are_escaped_and_paths_quoted() -> None:
    text = page()
    assert "T &amp; T" in text and "a &quot;cup&quot; &lt;1&gt;" in text and "too &lt;thin&gt;" in text
    assert Cards(text).pictures[0] == "gallery/b%201/six_views.png"
    assert "lpips" not in text and "http" not in text


def test_without_figures_there_is_nothing_to_sort() -> None:
    text = gallery_page("T", [], {}, COLUMNS, {"a": {}}, {"a": {}}, "psnr", {})
    assert [card for card, _, _ in Cards(text).cards] == ["a"]
    assert "<script>" not in text and "<select" not in text


@pytest.mark.parametrize(
    ("column", "order", "expected"),
    [("chamfer", "worst", "a d c b"), ("chamfer", "best", "c d a b"), ("psnr", "best", "c a b d")],
)
def test_a_browser_sorts_and_ranks_as_the_page_was_written(
    tmp_path: Path, column: str, order: str, expected: str
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser is installed")
    choose = f"<script>by.value = '{column}'; order.value = '{order}'; sort();</script></body>"
    (tmp_path / "page.html").write_text(page().replace("</body>", choose), encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    url = (tmp_path / "page.html").as_uri()
    shown = subprocess.run(
        [browser, *arguments, url], capture_output=True, text=True, timeout=120, check=False
    )
    if shown.returncode != 0:
        pytest.skip(f"{browser} does not run here: {shown.stderr[-200:]}")
    cards = Cards(re.sub(r"<script>.*?</script>", "", shown.stdout, flags=re.DOTALL)).cards
    assert " ".join(name for name, _, _ in cards) == expected
    written = {name: (kind, rank) for name, kind, rank in Cards(page(column)).cards}
    assert {name: (kind, rank) for name, kind, rank in cards} == written
