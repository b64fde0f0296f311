"""The encoded data set on disk: order, cache, workers, errors, and the report."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from glm_edge_ft.data import cache
from glm_edge_ft.data.collator import PaddedCollator
from glm_edge_ft.data.dataset import EncodedDataset, build_dataset, load_prompts
from glm_edge_ft.data.encoding import ConversationEncoder
from glm_edge_ft.data.report import format_report, preview, preview_json
from glm_edge_ft.data.workers import COLLECT_AFTER, clamp_processes, encode_in_order
from glm_edge_ft.errors import RunStopped, UserError
from tests.conftest import TEMPLATES, EncoderMaker, TokenizerMaker

WriteRows = Callable[..., Path]


def row(question: str = "how are you", answer: str = "you are fine", **keys: Any) -> dict[str, Any]:
    """Return a row of one turn."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **keys}


def test_rows_come_back_in_order_with_their_places(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """D1: two files, one after the other; labels are ids where supervised and -100 elsewhere."""
    first = write_rows([row(answer=str(number)) for number in range(600)])
    second = write_rows([row(answer="hello")], "more.json")
    encoder = make_encoder("glm")
    dataset, notices = build_dataset([first, second], encoder, 1, tmp_path / "cache", progress=False)
    assert (len(dataset), notices) == (601, [])
    texts = [encoder.tokenizer.backend.decode(dataset[index]["input_ids"].tolist()) for index in range(601)]
    assert texts == [f"\nhow are you\n{answer}" for answer in [*range(600), "hello"]]
    assert [(dataset.row(index)["file"], dataset.row(index)["line"]) for index in (0, 599, 600)] == [
        ("train.jsonl", 1),
        ("train.jsonl", 600),
        ("more.json", 1),
    ]
    sample = dataset[600]
    assert sample["labels"].tolist() == [-100] * 6 + sample["input_ids"].tolist()[6:]
    assert dataset.lengths.tolist() == [len(dataset[index]["input_ids"]) for index in range(601)]
    with pytest.raises(IndexError):
        dataset[601]


def test_worker_processes_give_the_same_bytes(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: `num_proc` changes the time, not the result."""
    path = write_rows([row(question="how are you " * (number % 50)) for number in range(2000)])
    encoder = make_encoder("glm", 64, 8)
    alone, _ = build_dataset([path], encoder, 1, tmp_path / "one", progress=False)
    monkeypatch.setattr("glm_edge_ft.data.workers.BYTES_PER_PROCESS", 1)
    together, _ = build_dataset([path], encoder, 2, tmp_path / "two", progress=False)
    for name in (cache.IDS_FILE, cache.MASK_FILE, cache.ROWS_FILE, cache.META_FILE):
        assert (alone.folder / name).read_bytes() == (together.folder / name).read_bytes()


@pytest.mark.parametrize("num_proc", [1, 2])
def test_a_bar_shows_how_far_the_encoding_is(
    make_encoder: EncoderMaker,
    write_rows: WriteRows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_proc: int,
) -> None:
    """D5: on stderr, in rows; the last it shows is their number."""
    path = write_rows([row(question="how are you " * (number % 50)) for number in range(700)])
    monkeypatch.setattr("glm_edge_ft.data.workers.BYTES_PER_PROCESS", 1)
    build_dataset([path], make_encoder("glm"), num_proc, tmp_path / "cache")
    shown = capsys.readouterr().err.rstrip("\n").split("\r")[-1]
    assert shown.startswith("encoding train.jsonl: 700 rows [")


def test_problems_of_worker_processes_arrive_in_order(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D2: up to 20 of each file, then how many more; nothing is left in the cache."""
    bad = write_rows([row() if number % 10 else {"message": []} for number in range(500)])
    worse = write_rows([{"messages": []}], "worse.jsonl")
    monkeypatch.setattr("glm_edge_ft.data.workers.BYTES_PER_PROCESS", 1)
    with pytest.raises(UserError) as caught:
        build_dataset([bad, worse], make_encoder("glm"), 2, tmp_path / "cache", progress=False)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"train.jsonl:{line}" for line in range(1, 201, 10)] + ["worse.jsonl:1", "train.jsonl"]
    assert caught.value.problems[-1].what == "... and 30 more"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_second_run_starts_from_the_cache(make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path) -> None:
    """D5: the same inputs open the same folder, and nothing in it is written again."""
    path = write_rows([row(), row(question="")])
    first, _ = build_dataset([path], make_encoder("glm"), 1, tmp_path / "cache", progress=False)
    before = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    path.touch()
    second, notices = build_dataset([path], make_encoder("glm"), 4, tmp_path / "cache", progress=False)
    assert notices == [f"train.jsonl: encoded data taken from {first.folder}"]
    assert {file: file.stat().st_mtime_ns for file in second.folder.iterdir()} == before
    assert second.report == first.report


def test_the_cache_is_keyed_by_everything_that_changes_the_ids(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """D5: content, name, template, tokenizer, stop tokens, budgets."""
    path = write_rows([row(), row()])
    same_size = write_rows([row(), row(answer="you are fina")], "train2.jsonl")
    other = make_tokenizer("glm")
    other.add_tokens(["fine"])
    vocabulary = other.get_vocab()
    encoders = [
        make_encoder("glm"),
        make_encoder("glm-newline"),
        make_encoder("glm", 100),
        make_encoder("glm", 4096, 100),
        ConversationEncoder(other, [vocabulary["<|user|>"], vocabulary["<|observation|>"]], 4096, 4096),
        ConversationEncoder(make_tokenizer("glm"), [vocabulary["<|user|>"]], 4096, 4096),
    ]
    folders = [build_dataset([path], encoder, 1, tmp_path / "c", progress=False)[0].folder for encoder in encoders]
    folders.append(build_dataset([same_size], encoders[0], 1, tmp_path / "c", progress=False)[0].folder)
    shutil.copy(same_size, path)
    folders.append(build_dataset([path], encoders[0], 1, tmp_path / "c", progress=False)[0].folder)
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", [cache.META_FILE, cache.IDS_FILE, cache.ROWS_FILE])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_cache_that_is_not_whole_is_ignored(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, name: str, damage: str
) -> None:
    """D5: a cut or missing file means that the rows are encoded again."""
    path = write_rows([row(), row()])
    encoder = make_encoder("glm")
    dataset, _ = build_dataset([path], encoder, 1, tmp_path / "cache", progress=False)
    expected = [dataset[index]["input_ids"].tolist() for index in range(2)]
    file = dataset.folder / name
    file.write_bytes(file.read_bytes()[:-1]) if damage == "cut" else file.unlink()
    again, notices = build_dataset([path], encoder, 1, tmp_path / "cache", progress=False)
    assert notices == []
    assert [again[index]["input_ids"].tolist() for index in range(2)] == expected


def test_the_cache_folder_comes_from_the_environment(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D5: where nothing is said, `GLM_EDGE_FT_CACHE` decides; one that cannot be written is refused by name."""
    path = write_rows([row()])
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "here"))
    dataset, _ = build_dataset([path], make_encoder("glm"), progress=False)
    assert dataset.folder.parent == tmp_path / "here"
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(path))
    with pytest.raises(UserError, match=r"encoded data cannot be written here: .*\n.*GLM_EDGE_FT_CACHE"):
        build_dataset([path], make_encoder("glm"), progress=False)


def test_few_rows_start_no_processes() -> None:
    """T7: `num_proc: 8` for little data is clamped with a notice."""
    assert clamp_processes(1, 10**9) == (1, None)
    processes, notice = clamp_processes(8, 1000)
    assert processes == 1
    assert notice is not None
    assert notice.startswith("num_proc 8 -> 1: 0.0 MB of data, ")
    assert clamp_processes(10**6, 10**12)[0] < 10**6


def test_garbage_is_collected_seldom_only_while_rows_are_encoded(make_encoder: EncoderMaker) -> None:
    """What comes afterwards collects as before, also where the encoding is left before its end."""
    before = gc.get_threshold()
    chunks: Any = encode_in_order(iter([(0, []), (0, [])]), make_encoder("glm"), 1)
    next(chunks)
    assert gc.get_threshold() == (COLLECT_AFTER, *before[1:])
    chunks.close()
    assert gc.get_threshold() == before


class _EndsTheProcess:
    """Whoever unpickles it is gone, as a process that the system kills."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (1,)


def test_a_worker_process_that_dies_stops_the_run() -> None:
    """D5: it does not hang, and says what to try."""
    encoder: Any = _EndsTheProcess()
    with pytest.raises(RunStopped, match=r"an encoding process ended by itself.*smaller num_proc"):
        list(encode_in_order(iter([(0, [])] * 20), encoder, 2))


def test_loader_workers_open_the_files_for_themselves(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """D5: the data set pickles to a few hundred bytes and serves spawned workers."""
    path = write_rows([row(answer="hello " * number) for number in range(1, 41)])
    dataset, _ = build_dataset([path], make_encoder("glm"), 1, tmp_path / "cache", progress=False)
    assert len(pickle.dumps(dataset)) < 2000
    loader: DataLoader[Any] = DataLoader(
        dataset,  # type: ignore[arg-type]  # a map-style data set needs no base class
        batch_size=8,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=PaddedCollator(pad_token_id=0),
    )
    lengths = np.concatenate([batch["attention_mask"].sum(dim=1).numpy() for batch in loader])
    assert lengths.tolist() == dataset.lengths.tolist()


def test_all_rows_dropped_is_refused(make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path) -> None:
    """M2: with the reasons and the way out."""
    path = write_rows([row(question="how " * 30), row()])
    with pytest.raises(UserError) as caught:
        build_dataset([path], make_encoder("glm", 3, 8), 1, tmp_path / "cache", progress=False)
    first, second, third = (str(problem) for problem in caught.value.problems)
    assert first == (
        "train.jsonl: all 2 rows are dropped: none leaves anything to learn within the budgets\n"
        "    -> raise max_input_length or max_output_length"
    )
    assert second.startswith("train.jsonl:1: the prompt of the first reply takes 34 tokens, 31 of them the user's text")
    assert third.startswith("train.jsonl:2: ")


def test_missing_and_empty_files_are_refused_together(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """D2: an empty file says "0 conversations"; missing files are all named."""
    with pytest.raises(UserError) as caught:
        build_dataset([tmp_path / "a.jsonl", tmp_path / "b.txt"], make_encoder("glm"), 1, tmp_path, progress=False)
    assert [problem.where for problem in caught.value.problems] == ["a.jsonl", "b.txt"]
    with pytest.raises(UserError, match=r"train.jsonl: 0 conversations"):
        build_dataset([write_rows([])], make_encoder("glm"), 1, tmp_path / "cache", progress=False)


def test_prompts_of_a_file(make_encoder: EncoderMaker, write_rows: WriteRows) -> None:
    """E2: the samples of all rows in order; bad rows are refused like in training."""
    path = write_rows([row(answer="a"), row(answer="b"), row(answer="c")], "dev.jsonl")
    encoder = make_encoder("glm")
    assert [(sample.line, sample.reference) for sample in load_prompts([path], encoder)] == [
        (1, "a"),
        (2, "b"),
        (3, "c"),
    ]
    assert len(load_prompts([path], encoder, limit=2)) == 2
    with pytest.raises(UserError, match=r"dev.jsonl:2: 'messages' must be a list"):
        load_prompts([write_rows([row(), {"messages": []}], "dev.jsonl")], encoder)


@pytest.fixture
def reported(make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path) -> EncodedDataset:
    """Five rows: whole, prompt cut, reply cut, control text and a foreign key, dropped."""
    system = {"role": "system", "content": "how " * 40}
    rows = [
        row(),
        row(question="how are you " * 10),
        row(answer="you are fine " * 10),
        row(question="a<|user|>b", id=3),
        {"messages": [system, *row()["messages"]]},
    ]
    return build_dataset([write_rows(rows)], make_encoder("glm", 12, 6), 1, tmp_path / "cache", progress=False)[0]


def test_the_report_counts_everything(reported: EncodedDataset) -> None:
    """D5, M2: rows, tokens by role, supervised tokens, cuts, drops by place, lengths, control text."""
    report = reported.report.to_json()
    assert report["rows"] == 4
    assert report["lengths"] == {"p50": 11, "p90": 17, "p95": 17, "p99": 17, "max": 17}
    assert report["tokens"] == 51
    assert report["supervised_tokens"] == 21
    assert report["role_tokens"] == {"system": 0, "user": 18, "assistant": 14, "other": 0, "template": 19}
    assert report["cut_rows"] == {"prompt_tokens_cut": 1, "reply_tokens_cut": 1, "tail_tokens_cut": 0}
    assert report["cut_tokens"] == {"prompt_tokens_cut": 22, "reply_tokens_cut": 27, "tail_tokens_cut": 0}
    assert report["dropped_rows"] == 1
    assert report["dropped"][0].startswith("train.jsonl:5: the prompt of the first reply takes ")
    assert (report["control_text_rows"], report["control_text"]) == (1, ("train.jsonl:4",))
    assert report["notices"] == ("key 'id' has no meaning here and is ignored (1 row)",)
    assert json.loads(json.dumps(report))["rows"] == 4


def test_what_the_template_leaves_out_is_said(
    make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """D3: system messages and tools that the template does not render are counted in notices."""
    template = TEMPLATES["glm"].replace("in ['system', 'user',", "in ['user',")
    system = {"role": "system", "content": "hello"}
    path = write_rows([{"messages": [system, *row()["messages"]]}] * 2 + [row(tools=[{"name": "f"}])])
    dataset, _ = build_dataset([path], make_encoder(template), 1, tmp_path / "cache", progress=False)
    assert dataset.report.notices == (
        "the model's chat template does not render 'tools' (1 row)",
        "the model's chat template leaves system messages out (2 rows)",
    )


def test_the_report_as_text(reported: EncodedDataset) -> None:
    """D5: a table for the terminal with every number of the report."""
    text = format_report(reported.report, "train.jsonl")
    for expected in (
        "supervised tokens                 21   41.2 %",
        "length in tokens      p50 11  p90 17  p95 17  p99 17  max 17",
        "rows cut: prompt shortened (max_input_length)",
        "22 tokens lost",
        "    train.jsonl:5: the prompt of the first reply takes ",
        "note: key 'id' has no meaning here and is ignored (1 row)",
    ):
        assert expected in text


def test_the_preview_shows_tokens_and_what_is_supervised(
    reported: EncodedDataset, make_tokenizer: TokenizerMaker
) -> None:
    """M1: token by token, with and without colour, and as JSON."""
    tokenizer = make_tokenizer("glm")
    rows = [reported.row(0)]
    assert preview(rows, tokenizer, color=False) == (
        "train.jsonl:1  11 tokens, 5 supervised\n"
        "<|user|>|\\n|how| are| you|<|assistant|>|«\\n»|«you»|« are»|« fine»|«<|user|>»"
    )
    assert "|\x1b[30;42m fine\x1b[0m|" in preview(rows, tokenizer, color=True)
    (shown,) = preview_json(rows, tokenizer)
    assert list(shown) == ["file", "line", "input_ids", "labels", "tokens"]
    assert shown["tokens"][:3] == ["<|user|>", "\n", "how"]
    assert shown["labels"][5:] == [-100, *shown["input_ids"][6:]]
    assert json.loads(json.dumps(shown)) == shown


def test_a_token_that_is_part_of_a_character_is_shown_as_spelled(
    make_encoder: EncoderMaker, make_tokenizer: TokenizerMaker, write_rows: WriteRows, tmp_path: Path
) -> None:
    """M1: no replacement characters in the preview."""
    path = write_rows([row(answer="龘")])
    dataset, _ = build_dataset([path], make_encoder("glm"), 1, tmp_path / "cache", progress=False)
    (shown,) = preview_json([dataset.row(0)], make_tokenizer("glm"))
    assert "".join(shown["tokens"][7:-1]) == "é¾ĺ"


def test_the_data_room_imports_no_torch() -> None:
    """D5: worker processes start fast; only the collator needs torch."""
    code = (
        "import sys, glm_edge_ft.data.dataset, glm_edge_ft.data.report, glm_edge_ft.data.prompts;"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


_MEASURE = """
import pickle, sys
from pathlib import Path
from glm_edge_ft.data.dataset import build_dataset
encoder = pickle.load(open(sys.argv[1], "rb"))
dataset, _ = build_dataset([Path(sys.argv[2])], encoder, 2, Path(sys.argv[3]), progress=False)
status = Path("/proc/self/status").read_text()
print(len(dataset), status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_rows(make_encoder: EncoderMaker, write_rows: WriteRows, tmp_path: Path) -> None:
    """D5: 200,000 rows take less than 10 MB more than 20,000 rows."""
    encoder_file = tmp_path / "encoder.pickle"
    encoder_file.write_bytes(pickle.dumps(make_encoder("glm")))
    peaks = []
    for count in (20_000, 200_000):
        path = write_rows(row(question=f"how are you {number}", answer="you are fine " * 8) for number in range(count))
        command = [sys.executable, "-c", _MEASURE, str(encoder_file), str(path), str(tmp_path / "cache")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, kilobytes = map(int, result.stdout.split())
        assert rows == count
        peaks.append(kilobytes)
    assert peaks[1] - peaks[0] < 10_000
