"""The page of runs: its structure, that its numbers are the logged ones, and what it makes of incomplete folders."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from glm_edge_ft import __main__ as tool
from glm_edge_ft.errors import UserError
from glm_edge_ft.report import report
from glm_edge_ft.report.content import MAXIMUM_ROWS, MAXIMUM_ROWS_IN_ALL
from glm_edge_ft.report.reading import read_run
from glm_edge_ft.training.curves import MAXIMUM_POINTS, iter_metrics, read_points, write_loss_curve
from glm_edge_ft.training.logs import cut_back
from tests.report.runs import LOG, SCRIPT, lines, prediction, read_page, write_run
from tests.vision_folders import draw

PARTS = Path(tool.__file__).parent / "report"
ROWS = [prediction(1, "今天天气很好", 100.0), prediction(2, "今天下雨", 30.0)]


def page_of(*folders: Path, out: Path) -> dict[str, Any]:
    """Write a page and return its data."""
    report(folders, out)
    return read_page(out)[1]


def texts(content: dict[str, Any], rows: list[list[Any]]) -> list[list[str]]:
    """Return place, prompt, reference and prediction of rows, which name them by number."""
    return [[content["texts"][number] for number in row[:4]] for row in rows]


def notes(content: dict[str, Any], run: int = 0) -> list[list[str]]:
    """Return what the page says a run lacks."""
    found: list[list[str]] = content["runs"][run]["notes"]
    return found


def test_the_page_is_whole_and_points_nowhere(tmp_path: Path) -> None:
    """Elements close in turn; no element has an address; the two scripts are the data and the page's own."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    report([run], tmp_path / "page.html")
    reader, _ = read_page(tmp_path / "page.html")
    assert reader.open_elements == []
    assert reader.values == []
    assert reader.elements.count("script") == 2
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched


def test_text_of_the_data_is_never_markup(tmp_path: Path) -> None:
    """Script tags, comment marks, line separators and half of a surrogate pair come through as text."""
    nasty = f"{SCRIPT}</script><!--\u2028\u2029&amp; {{{{style}}}} \ud800"
    rows = [prediction(1, nasty, 0.0, prompt=nasty)]
    run = write_run(tmp_path / "<b>run", {})
    (run / "predictions" / "eval-20.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    report([run], tmp_path / "page.html")
    reader, content = read_page(tmp_path / "page.html")
    assert reader.elements.count("script") == 2
    assert "b" not in reader.elements
    assert "<b>run" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    (shown,) = texts(content, content["runs"][0]["files"][0]["rows"])
    assert (shown[1], shown[3]) == (nasty.replace("\ud800", "?"),) * 2
    assert not set("<>&\u2028\u2029") & set(reader.json)


def test_the_numbers_are_those_of_the_log(tmp_path: Path) -> None:
    """Every curve has the points of metrics.jsonl, every evaluation its scores."""
    content = page_of(write_run(tmp_path / "run", {"eval-20": ROWS}), out=tmp_path / "page.html")
    run = content["runs"][0]
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "eval_loss", "eval_rouge-l"):
        assert run["curves"][key] == [[line["step"], line[key]] for line in LOG if key in line]
    assert [(one["set"], one["step"], one["loss"], one["rouge-l"]) for one in run["evaluations"]] == [
        ("eval", 0, 5.25, 1.5),
        ("eval", 20, 3.5, 42.125),
        ("test", 20, 3.75, 40.5),
    ]
    assert run["ended"]["train_runtime"] == 61.0
    assert notes(content) == []


def test_the_rows_are_those_of_the_predictions(tmp_path: Path) -> None:
    """Place, texts and scores; the files by their steps, 40 before 120."""
    files = {"eval-120": ROWS, "eval-40": ROWS[:1], "test-120": ROWS}
    content = page_of(write_run(tmp_path / "run", files), out=tmp_path / "page.html")
    assert [file["name"] for file in content["runs"][0]["files"]] == ["eval-40", "eval-120", "test-120"]
    rows = content["runs"][0]["files"][1]["rows"]
    assert texts(content, rows)[1] == ["dev.jsonl:2:1", "<|user|>\n问题2<|assistant|>", "今天天气很好", "今天下雨"]
    assert rows[1][4:] == [[30.0] * 5, []]


def test_a_text_stands_once_however_many_files_repeat_it(tmp_path: Path) -> None:
    """Each evaluation of a run has the same prompts and references; here one reply equals its reference as well."""
    content = page_of(write_run(tmp_path / "run", {"eval-0": ROWS, "eval-20": ROWS}), out=tmp_path / "page.html")
    assert len(content["texts"]) == len(set(content["texts"])) == 6


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    """The shortest ends of their paths that differ; the same folder twice gets a number."""
    folders = [write_run(tmp_path / name / "output", {}) for name in ("a", "b")]
    content = page_of(*folders, out=tmp_path / "page.html")
    assert [run["name"] for run in content["runs"]] == ["a/output", "b/output"]
    content = page_of(folders[0], folders[0], out=tmp_path / "page.html")
    assert [run["name"] for run in content["runs"]] == ["output", "output (2)"]


def test_images_become_small_jpegs_each_once(tmp_path: Path) -> None:
    """At most 160 px; a picture that is gone is counted and named."""
    picture = draw(tmp_path / "dog.png", 1)
    gone = str(tmp_path / "gone.png")
    rows = [prediction(line, "a", 0.0, images=[str(picture), gone]) for line in (1, 2)]
    content = page_of(write_run(tmp_path / "run", {"eval-20": rows}), out=tmp_path / "page.html")
    (url,) = content["images"]
    head, _, body = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    assert (head, image.format, max(image.size) <= 160) == ("data:image/jpeg;base64", "JPEG", True)
    assert [row[5] for row in content["runs"][0]["files"][0]["rows"]] == [[0, None], [0, None]]
    assert notes(content) == [["images_missing", "1", gone]]


def test_of_many_rows_the_worst_and_the_best_are_kept(tmp_path: Path) -> None:
    """In the order of the data, with a line that says so."""
    count = MAXIMUM_ROWS + 10
    rows = [prediction(line, "a", 100 * line / count) for line in range(count)]
    content = page_of(write_run(tmp_path / "run", {"eval-20": rows}), out=tmp_path / "page.html")
    half = MAXIMUM_ROWS // 2
    kept = [row[0] for row in texts(content, content["runs"][0]["files"][0]["rows"])]
    assert kept == [f"dev.jsonl:{line}:1" for line in [*range(half), *range(count - half, count)]]
    assert notes(content) == [["rows_capped", "eval-20", str(MAXIMUM_ROWS), str(count), str(half)]]


def test_many_files_have_fewer_rows_each(tmp_path: Path) -> None:
    """Forty evaluations of a hundred rows fit; of a thousand they would make a page that no mail takes."""
    rows = [prediction(line, f"{line} " * 100, 0.0) for line in range(1000)]
    files = {f"eval-{step}": rows for step in range(40)}
    target = tmp_path / "page.html"
    content = page_of(write_run(tmp_path / "run", files), out=target)
    assert {len(file["rows"]) for file in content["runs"][0]["files"]} == {MAXIMUM_ROWS_IN_ALL // 40}
    assert len(notes(content)) == 40
    assert target.stat().st_size < 2_000_000


def test_a_run_that_is_still_going_gives_a_page(tmp_path: Path) -> None:
    """The log's last line is half written, predictions have begun; the page says how far the run is."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS}, LOG[:3])
    for path in (run / "metrics.jsonl", run / "predictions/eval-20.jsonl"):
        path.write_bytes(path.read_bytes() + '{"step": 30, "prediction": "今'.encode()[:-1])
    content = page_of(run, out=tmp_path / "page.html")
    assert content["runs"][0]["curves"]["loss"] == [[10, 4.5], [20, 3.25]]
    assert len(content["runs"][0]["files"][0]["rows"]) == 2
    assert notes(content) == [["unfinished", "20 / 20"]]


def test_broken_lines_among_the_predictions_are_counted(tmp_path: Path) -> None:
    """Something else than an object, an object without a reply; not the last line, which is still being written."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    path = run / "predictions/eval-20.jsonl"
    path.write_text('[1]\n{"reference": "a"}\n' + path.read_text(encoding="utf-8") + "{", encoding="utf-8")
    content = page_of(run, out=tmp_path / "page.html")
    assert len(content["runs"][0]["files"][0]["rows"]) == 2
    assert notes(content) == [["broken_lines", "predictions/eval-20.jsonl", "2"]]


@pytest.mark.parametrize(
    ("name", "missing"), [("run.json", "no_record"), ("metrics.jsonl", "no_metrics"), ("predictions", "no_predictions")]
)
def test_what_is_missing_is_said(name: str, missing: str, tmp_path: Path) -> None:
    """Each piece may be absent."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS} if name != "predictions" else {})
    if name != "predictions":
        (run / name).unlink()
    assert [missing] in notes(page_of(run, out=tmp_path / "page.html"))


@pytest.mark.parametrize("text", ["", "[1]", '{"config": ', "\udcff"])
def test_a_broken_record_is_said(text: str, tmp_path: Path) -> None:
    """run.json cut off, empty, something else or no UTF-8: the rest is shown."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    (run / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    content = page_of(run, out=tmp_path / "page.html")
    assert ["bad_record"] in notes(content)
    assert content["runs"][0]["curves"]["loss"] == [[10, 4.5], [20, 3.25]]


@pytest.mark.parametrize("record", [{"config": [1], "facts": "x", "data": 3, "overrides": 7}, {"config": None}])
def test_a_record_of_another_kind_gives_a_page(record: dict[str, Any], tmp_path: Path) -> None:
    """Values of other types than a run writes."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert page_of(run, out=tmp_path / "page.html")["runs"][0]["record"]["config"] == record["config"]


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    """A hub token in the config or on the command line stays at home."""
    run = write_run(tmp_path / "run", {}, hub_token="hf_secret")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["overrides"] = ["training_args.hub_token=hf_secret", "training_args.max_steps=20"]
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    content = page_of(run, out=tmp_path / "page.html")
    assert "hf_secret" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert content["runs"][0]["record"]["overrides"] == ["training_args.hub_token=***", "training_args.max_steps=20"]


def test_measured_models_are_shown_by_name(tmp_path: Path) -> None:
    """The folder of `evaluate` has neither a record nor steps of training: no word of an unfinished run."""
    (tmp_path / "measured/predictions").mkdir(parents=True)
    measured = {"model": "output/demo", "step": None, "test_loss": 2.5, "test_rouge-l": 12.5}
    (tmp_path / "measured/metrics.jsonl").write_text(lines([measured]), encoding="utf-8")
    (tmp_path / "measured/predictions/demo.jsonl").write_text(lines(ROWS), encoding="utf-8")
    content = page_of(tmp_path / "measured", out=tmp_path / "page.html")
    (one,) = content["runs"][0]["evaluations"]
    assert (one["model"], one["step"], one["loss"], one["rouge-l"]) == ("output/demo", None, 2.5, 12.5)
    assert notes(content) == [["no_record"]]


def test_all_errors_are_listed_with_what_was_looked_for(tmp_path: Path) -> None:
    """A folder of something else, a checkpoint, a file, nothing; a target that is no page; an unknown language."""
    (tmp_path / "run/checkpoint-4").mkdir(parents=True)
    (tmp_path / "file").write_text("", encoding="utf-8")
    folders = [tmp_path / name for name in ("run", "run/checkpoint-4", "file", "absent")]
    with pytest.raises(UserError) as caught:
        report(folders, tmp_path / "page.txt", "fr")
    found = {problem.where: f"{problem.what} -> {problem.fix}" for problem in caught.value.problems}
    places = [f"OUTPUT_DIR {folder}" for folder in folders]
    assert list(found) == ["--language", f"--out {tmp_path / 'page.txt'}", *places]
    expected = (
        "'fr'",
        str(tmp_path / "page.html"),
        "no run.json",
        str(tmp_path / "run"),
        "is a file",
        "no such folder",
    )
    assert all(part in text for part, text in zip(expected, found.values(), strict=True))
    assert not (tmp_path / "page.txt").exists()


def test_a_target_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    """With a name in it."""
    run = write_run(tmp_path / "run", {})
    (tmp_path / "pages.html").mkdir()
    with pytest.raises(UserError, match=r"--out .*pages\.html: is a folder\n.*pages\.html/report\.html"):
        report([run], tmp_path / "pages.html")


def test_the_command_writes_into_the_first_folder(tmp_path: Path) -> None:
    """Exit code 0 and the page's name; 2 for a wrong folder."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    done = CliRunner().invoke(tool.app, ["report", str(run), "--language", "zh"])
    assert (done.exit_code, str(run / "report.html") in done.stdout) == (0, True)
    assert read_page(run / "report.html")[1]["language"] == "zh"
    assert CliRunner().invoke(tool.app, ["report", str(tmp_path)]).exit_code == 2


def test_every_note_has_its_sentence() -> None:
    """The script has a label, in both languages, for each note that reading and drawing give."""
    sources = "".join(path.read_text(encoding="utf-8") for path in PARTS.glob("*.py"))
    keys = set(re.findall(r'notes\.append\(\("(\w+)"', sources))
    labels = dict(re.findall(r"(\w+): (\[\"[^\n\]]+\"\])", (PARTS / "page.js").read_text(encoding="utf-8")))
    assert len(keys) >= 8
    for key in keys:
        english, chinese = json.loads(labels[key])
        assert english.isascii()
        assert not chinese.isascii()


def test_reading_does_not_change_the_folder(tmp_path: Path) -> None:
    """A run that goes on writing is not disturbed."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    read_run(run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


HUGE = '{"step": 30, "loss": 1' + "0" * 400 + ', "eval_loss": 1' + "0" * 400 + "}\n"
ODD_LINES = (
    HUGE,
    '{"step": 1' + "0" * 400 + ', "loss": 1.0}\n',
    '{"step": 31, "loss": 1' + "0" * 5000 + "}\n",
    '{"step": NaN, "loss": 1.0, "eval_loss": Infinity}\n',
    '{"step": "32", "loss": "2.5", "eval_loss": "low", "eval_rouge-l": null, "model": {"a": [1]}}\n',
    '{"step": 36, "loss": 1.7e308}\n',
    '{"step": 33, "eval_loss": [1], "eval_rouge-l": true, "train_runtime": 1e999}\n',
    '{"step": 34, "loss": 1e300, "learning_rate": -1e300}\n',
    '{"a": ' + "[" * 100_000 + "\n",
    '{"step": 35, "loss": 2.0, "a": ' + "[" * 600 + "]" * 600 + "}\n",
    "[1]\n\n7\n\udcff\n",
)


def test_numbers_that_are_none_and_nesting_without_end_give_a_page(tmp_path: Path) -> None:
    """K30: 400 and 5,000 digits, NaN, text, null, 100,000 brackets; numbers are drawn, in `loss.png` too."""
    run = write_run(tmp_path / "run", {"eval-20": [prediction(1, "x", 1.0) | {"rouge-l": 10**400, "line": 10**400}]})
    with (run / "metrics.jsonl").open("a", encoding="utf-8", errors="surrogateescape") as log:
        log.writelines(ODD_LINES)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    nested = json.dumps(record | {"data": 0}).replace('"data": 0', f'"data": {"[" * 400}1{"]" * 400}, "x": 1e999')
    (run / "run.json").write_text(nested, encoding="utf-8")
    content = page_of(run, out=tmp_path / "page.html")["runs"][0]
    assert content["curves"]["loss"] == [[10, 4.5], [20, 3.25], [34, 1e300], [35, 2.0]]
    assert content["curves"]["eval_loss"] == [[0, 5.25], [20, 3.5]]
    numbers = [value for one in content["evaluations"] for key, value in one.items() if key not in ("set", "model")]
    assert {type(number) for number in numbers} <= {int, float, type(None)}
    write_loss_curve(iter_metrics(run / "metrics.jsonl"), tmp_path / "loss.png", "odd")
    assert (tmp_path / "loss.png").is_file()
    cut_back(run / "metrics.jsonl", 20)  # as a resumed run does
    assert read_points(iter_metrics(run / "metrics.jsonl"), ["loss"])["loss"] == ([10, 20], [4.5, 3.25])


def peak_memory_of_report(run: Path) -> int:
    """Return the most memory, in bytes, that the command takes for a run."""
    process = subprocess.Popen([sys.executable, "-m", "glm_edge_ft", "report", str(run)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def test_memory_does_not_grow_with_the_lines_of_a_log(tmp_path: Path) -> None:
    """K30: 100,000 lines; as objects they would take 100 MB, a million of them more than 1 GB."""
    run = write_run(tmp_path / "run", {"eval-20": ROWS})
    little = peak_memory_of_report(run)
    line = (
        '{{"step": {0}, "loss": {0}.5, "grad_norm": 1.5, "learning_rate": 0.1, "epoch": 0.5, "tokens_per_second": 9}}'
    )
    with (run / "metrics.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(line.format(step) + "\n" for step in range(100_000))
    assert peak_memory_of_report(run) < little + 40e6
    curves = read_page(run / "report.html")[1]["runs"][0]["curves"]
    assert len(curves["loss"]) <= MAXIMUM_POINTS
    assert curves["loss"][-1] == [99_999, 99_999.5]


def test_a_table_of_evaluations_has_an_end(tmp_path: Path) -> None:
    """K30: of very many the last ones are shown, and it is said how many there are."""
    run = write_run(tmp_path / "run", {}, [{"step": step, "eval_loss": 1.0} for step in range(3000)])
    content = page_of(run, out=tmp_path / "page.html")
    assert content["runs"][0]["evaluations"][-1]["step"] == 2999
    assert ["evaluations_capped", "1000", "3000"] in notes(content)
