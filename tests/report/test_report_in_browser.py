"""The page in a real browser: it complains of nothing, draws, filters and sorts, and fits on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from glm_edge_ft.report import report
from tests.report.browser import Page, find_browser, open_browser
from tests.report.runs import SCRIPT, prediction, write_run
from tests.vision_folders import draw

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on PATH: apt-get install chromium")
TEXTS = "[...document.querySelectorAll('.pair')].map(pair => pair.querySelectorAll('.text')[2].textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Return a browser's page; all tests of this file share the browser."""
    assert BROWSER is not None
    with open_browser(BROWSER, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of two runs."""
    folder = tmp_path_factory.mktemp("report")
    picture = str(draw(folder / "dog.png", 1))
    rows = [
        prediction(1, "今天天气很好", 100.0, images=[picture]),
        prediction(2, f"{SCRIPT}</script><img src=x onerror=alert(2)>", 0.0),
        prediction(3, "今天天气不好", 60.0),
    ]
    many = [prediction(line, f"reply {line}", float(line)) for line in range(60)]
    first = write_run(folder / "first", {"eval-0": rows[:1], "eval-20": rows}, learning_rate=0.001)
    second = write_run(folder / "second", {"eval-20": rows[:1], "test-20": many}, learning_rate=0.002)
    report([first, second], folder / "page.html")
    return folder / "page.html"


@pytest.fixture
def opened(page: Page, html: Path) -> Page:
    """Return the page of two runs, freshly loaded, at the width of a desktop."""
    page.complaints.clear()
    page.size(1280, 900)
    page.open(html)
    return page


def test_the_page_complains_of_nothing_and_asks_for_nothing(opened: Page) -> None:
    """No message of the console, no exception, no request to the network; what a prediction holds is shown, not run."""
    opened.choose("#file", "eval-20")
    shown = opened.evaluate(TEXTS)
    assert f"{SCRIPT}</script><img src=x onerror=alert(2)>" in shown
    assert opened.evaluate("document.querySelectorAll('script').length") == 2
    assert opened.complaints == []


def test_a_complaint_would_be_heard(opened: Page) -> None:
    """The test above can fail."""
    opened.evaluate("setTimeout(() => { throw new Error('loud'); })")
    opened.evaluate("console.error('louder')")
    opened.evaluate("1")
    assert "loud" in "".join(opened.complaints)
    assert "louder" in "".join(opened.complaints)


def test_no_other_script_would_run(opened: Page) -> None:
    """Markup that came in after all, which it should not, is kept from running by the page's policy."""
    opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<button onclick=\"window.ran = 1\">')")
    opened.evaluate("document.querySelector('body > button').click()")
    opened.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 2'}))")
    assert opened.evaluate("window.ran === undefined") is True
    assert sum("Content Security Policy" in complaint for complaint in opened.complaints) >= 2


def test_curves_of_all_runs_are_drawn(opened: Page) -> None:
    """Loss has train and dev of both runs, the learning rate one line each; a pointer over it shows the values."""
    counts = opened.evaluate(
        "Object.fromEntries([...document.querySelectorAll('svg')].map("
        "svg => [svg.getAttribute('aria-label'), svg.querySelectorAll('path').length]))"
    )
    assert (counts["loss"], counts["learning rate"], counts["rouge-l, dev"]) == (4, 2, 2)
    place = opened.evaluate(
        "(() => { const svg = document.querySelector('svg'); svg.scrollIntoView({block: 'center'});"
        "const box = svg.getBoundingClientRect(); return [box.right - 12, box.top + 50]; })()"
    )
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    tip = opened.evaluate("document.getElementById('tip').innerText")
    assert tip.splitlines() == [
        "step 20",
        "first, train: 3.25",
        "first, dev: 3.5",
        "second, train: 3.25",
        "second, dev: 3.5",
    ]


def test_the_search_filters(opened: Page) -> None:
    """Typing leaves the rows that hold the text, in any of their parts."""
    opened.choose("#file", "")
    opened.type_into("#search", "reply 17")
    assert opened.evaluate(TEXTS) == ["reply 17"]
    opened.evaluate("document.querySelector('#search').select()")
    opened.type_into("#search", "DEV.jsonl:3:1")
    assert opened.evaluate(TEXTS) == ["reply 3", "今天天气不好"]


def test_rows_are_sorted_filtered_and_paged(opened: Page) -> None:
    """By score, worst or best first; by run and file; 25 a page."""
    opened.choose("#file", "eval-20")
    opened.choose("#run", "0")
    assert [text[:6] for text in opened.evaluate(TEXTS)] == ["<scrip", "今天天气不好", "今天天气很好"]
    opened.choose("#order", "best")
    assert [text[:6] for text in opened.evaluate(TEXTS)] == ["今天天气很好", "今天天气不好", "<scrip"]
    opened.choose("#run", "")
    opened.choose("#file", "test-20")
    opened.evaluate("document.querySelectorAll('#rows button')[1].click()")
    assert opened.evaluate(TEXTS) == [f"reply {line}" for line in range(34, 9, -1)]
    assert opened.evaluate("document.querySelector('.found').textContent") == "60 of 65 · page 2 of 3"


def test_differences_are_marked(opened: Page) -> None:
    """Word by word, character by character in Chinese; equal texts bear no mark."""
    opened.choose("#file", "eval-20")
    opened.choose("#run", "0")
    marks = (
        "[...document.querySelectorAll('.pair')].map("
        "pair => [...pair.querySelectorAll('mark')].map(mark => [mark.className, mark.textContent]))"
    )
    assert opened.evaluate(marks)[1:] == [[["missing", "很"], ["extra", "不"]], []]


def test_configs_show_what_differs(opened: Page) -> None:
    """The learning rates, and nothing that is the same."""
    rows = opened.evaluate("[...document.querySelectorAll('#differences tbody tr')].map(r => r.innerText.split('\\t'))")
    assert rows == [["training_args.learning_rate", "0.001", "0.002"]]


def test_labels_are_chinese_or_english(opened: Page) -> None:
    """The switch changes all headings."""
    headings = "[...document.querySelectorAll('h2')].map(heading => heading.textContent)"
    assert opened.evaluate(headings) == ["Summary", "Curves", "Evaluations", "Predictions", "Config", "Data"]
    opened.choose("#language", "zh")
    assert opened.evaluate(headings) == ["概览", "曲线", "评测", "预测", "配置", "数据"]


@pytest.mark.parametrize("width", [1280, 400, 360])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_in_light_and_dark(width: int, dark: bool, opened: Page, html: Path, tmp_path: Path) -> None:
    """Nothing is wider than the window; the background follows the system; the picture has the window's width."""
    opened.size(width, 900, dark)
    opened.open(html)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as picture:
        red = picture.convert("RGB").tobytes()[3 * (2 * picture.width + 2)]
        assert width - 20 <= picture.width <= width  # less a scroll bar
        assert (red < 64) is dark
