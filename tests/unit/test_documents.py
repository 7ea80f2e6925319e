import io
import os
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from ingestq.common.errors import RequestRefused
from ingestq.common.schema import IngestRequest, Sampling
from ingestq.producer import documents
from ingestq.producer.documents import read_documents

PAGES = Path(__file__).parents[2] / "deploy" / "demo" / "documents"


def read(*paths: Any, **options: Any) -> tuple[list[IngestRequest], list[RequestRefused]]:
    refused: list[RequestRefused] = []
    requests = list(read_documents(map(str, paths), model="m", on_refused=refused.append, **options))
    return requests, refused


def the_refusal(*paths: Any) -> str:
    requests, refused = read(*paths)
    assert requests == []
    assert len(refused) == 1
    return str(refused[0])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rows(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


# --- where documents are


def test_a_document_is_named_by_its_path_as_given(folder):
    (folder / "a.txt").write_text("hello")
    assert [request.document_id for request in read("a.txt")[0]] == ["a.txt"]
    assert [request.document_id for request in read("./a.txt")[0]] == ["./a.txt"]


def test_a_folder_is_read_to_its_depth_in_sorted_order_without_hidden_files(folder):
    for name in ("b/z.txt", "b/a/y.md", "a.txt", ".hidden.txt", ".git/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hello")
    requests, refused = read("b", "a.txt", ".")
    assert [request.document_id for request in requests] == [
        "b/a/y.md",
        "b/z.txt",
        "a.txt",
        "./a.txt",
        "./b/a/y.md",
        "./b/z.txt",
    ]
    assert refused == []


def test_a_link_to_a_folder_is_refused_so_that_a_loop_ends(folder):
    (folder / "in").mkdir()
    (folder / "in" / "a.txt").write_text("hello")
    (folder / "in" / "up").symlink_to(folder)
    requests, refused = read("in")
    assert [request.document_id for request in requests] == ["in/a.txt"]
    assert "not followed" in str(refused[0])


def test_a_glob_gives_each_matching_file_once(folder):
    for name in ("d/a.txt", "d/e/b.txt", "d/e/c.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("hello")
    assert [request.document_id for request in read("d/**")[0]] == ["d/a.txt", "d/e/b.txt", "d/e/c.md"]
    assert [request.document_id for request in read("d/*")[0]] == ["d/a.txt", "d/e/b.txt", "d/e/c.md"]
    assert [request.document_id for request in read("**/*.md")[0]] == ["d/e/c.md"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder):
    (folder / "a[1].txt").write_text("hello")
    assert [request.document_id for request in read("a[1].txt")[0]] == ["a[1].txt"]


def test_a_path_or_glob_without_a_file_is_refused(folder):
    assert the_refusal("none.txt") == "document 'none.txt': no such file or folder"
    assert the_refusal("*.txt") == "document '*.txt': no file matches"


def test_reading_is_lazy(folder):
    write_rows(folder / "a.jsonl", {"text": "one"})
    requests = read_documents(["a.jsonl", "later.txt"], model="m")
    assert next(requests).text == "one"
    (folder / "later.txt").write_text("two")
    assert next(requests).text == "two"


# --- what every document gets


def test_requests_carry_what_the_run_gives_them(folder):
    (folder / "a.txt").write_text("hello")
    sampling = Sampling(max_tokens=7)
    requests, _ = read("a.txt", sampling=sampling, system="s", instruction="i", chat=False)
    expected = IngestRequest(
        document_id="a.txt", text="hello", model="m", system="s", instruction="i", chat=False, sampling=sampling
    )
    assert requests == [expected]


def test_one_bad_document_does_not_stop_the_others(folder):
    (folder / "1.txt").write_text("one")
    (folder / "2.pdf").write_bytes(b"%PDF")
    (folder / "3.txt").write_bytes(b"caf\xe9")
    (folder / "4.txt").write_text("four")
    requests, refused = read(".")
    assert [request.text for request in requests] == ["one", "four"]
    assert [refusal.document_id for refusal in refused] == ["./2.pdf", "./3.txt"]


def test_without_a_callback_the_first_bad_document_raises(folder):
    with pytest.raises(RequestRefused, match="no such file"):
        list(read_documents(["none.txt"], model="m"))


# --- plain text


def test_a_byte_order_mark_is_not_text(folder):
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read("a.txt")[0][0].text == "hello"


def test_text_that_is_not_utf8_is_refused_with_the_place(folder):
    (folder / "a.txt").write_bytes(b"caf\xe9 au lait")
    assert "is not UTF-8" in the_refusal("a.txt")
    assert "at byte 3" in the_refusal("a.txt")


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b" \n\t ", "has no text")])
def test_a_file_without_text_is_refused(folder, content, message):
    (folder / "a.txt").write_bytes(content)
    assert message in the_refusal("a.txt")


def test_an_unknown_kind_is_refused_naming_the_known_ones(folder):
    (folder / "a.docx").write_bytes(b"PK")
    assert the_refusal("a.docx") == (
        "document 'a.docx': unknown kind of file '.docx'; known are .jsonl, .txt, .md, .html, .htm"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(folder):
    (folder / "a.txt").write_text("hello")
    (folder / "a.txt").chmod(0)
    assert "Permission denied" in the_refusal("a.txt")


def test_a_dangling_link_is_refused(folder):
    (folder / "a.txt").symlink_to("nowhere")
    assert "No such file" in the_refusal("a.txt")


def test_a_huge_file_is_refused_without_reading_it_all(folder, monkeypatch):
    monkeypatch.setattr(documents, "MAX_SOURCE_BYTES", 10)
    (folder / "a.txt").write_text("x" * 11)
    assert "over 10 bytes" in the_refusal("a.txt")


def test_a_file_name_that_can_not_name_a_document_is_refused_in_one_line(folder):
    (folder / "a\nb.txt").write_text("hello")
    assert "\n" not in the_refusal(".")
    assert "document_id" in the_refusal(".")


# --- HTML


def test_the_text_of_real_pages_is_extracted_and_carries_no_markup():
    requests, refused = read(*sorted(PAGES.glob("*.html")))
    assert refused == []
    assert len(requests) >= 10
    for request in requests:
        assert not any(markup in request.text for markup in ("<p", "<div", "</", "class=", "&amp;", "&lt;"))


def test_a_page_keeps_its_title_code_and_output():
    requests, _ = read(PAGES / "tutorial-delete.html")
    text = requests[0].text
    assert text.startswith("2.9. Deletions\n")
    assert "DELETE FROM weather WHERE city = 'Hayward';" in text
    assert "\n San Francisco |      46 |      50 | 0.25 | 1994-11-27\n" in text
    assert "stylesheet" not in text


def test_a_page_keeps_its_tables():
    requests, _ = read(PAGES / "view-pg-timezone-names.html")
    assert "utc_offset" in requests[0].text


def test_a_page_without_a_main_part_gives_all_its_text(folder):
    (folder / "a.htm").write_text("<html><head><title>T</title></head><body><b>hi</b> there</body></html>")
    assert read("a.htm")[0][0].text == "T\n\nhi there"


def test_a_page_may_be_in_the_encoding_that_it_declares(folder):
    page = "<html><head><meta charset='iso-8859-1'></head><body><p>Un café au lait, et pas de thé.</p></body></html>"
    (folder / "a.html").write_bytes(page.encode("latin-1"))
    assert read("a.html")[0][0].text == "Un café au lait, et pas de thé."


@pytest.mark.parametrize(
    "page", [b"<html><body><script>alert(1)</script></body></html>", b"no markup at all", b"\x00\x01\x02\xff"]
)
def test_a_page_without_text_is_refused_not_passed_as_markup(folder, page):
    (folder / "a.html").write_bytes(page)
    assert "no text found in the page" in the_refusal("a.html")


# --- JSON lines


def test_a_row_may_bring_its_own_id_instruction_and_system(folder):
    write_rows(
        folder / "a.jsonl",
        {"document_id": "one", "text": "1", "instruction": "own", "system": "its"},
        {"id": 2, "text": "2", "system": None},
        {"text": "3"},
    )
    requests, refused = read("a.jsonl", instruction="common", system="base")
    assert refused == []
    assert [(r.document_id, r.text, r.instruction, r.system) for r in requests] == [
        ("one", "1", "own", "its"),
        ("2", "2", "common", "base"),
        ("a.jsonl:3", "3", "common", "base"),
    ]


def test_blank_lines_are_skipped_but_counted(folder):
    (folder / "a.jsonl").write_text('\n{"text": "x"}\n\n{"text": "y"}')
    assert [request.document_id for request in read("a.jsonl")[0]] == ["a.jsonl:2", "a.jsonl:4"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "is not JSON"),
        (b'{"text": "\xff"}', "is not JSON"),
        (b'["x"]', "is not a JSON object"),
        (b'{"document_id": "x"}', "has no field text"),
        (b'{"text": 5}', "not a string: text"),
        (b'{"text": "x", "id": true}', "not a string: document_id"),
        (b'{"text": "x", "id": "a", "document_id": "b"}', "both id and document_id"),
        (b'{"text": "x", "url": "u", "lang": "en"}', "unknown fields 'url', 'lang'; known are text, document_id"),
        (b'{"text": "  "}', "has no text"),
        (b'{"text": "x", "id": ""}', "document_id"),
        (b'{"text": "x", "id": "a\\u001b[31m"}', "document_id"),
        (b'{"text": "\\ud800"}', ""),
    ],
)
def test_a_bad_row_is_refused_and_the_next_one_read(folder, line, message):
    (folder / "a.jsonl").write_bytes(line + b'\n{"text": "good", "id": "good"}\n')
    requests, refused = read("a.jsonl")
    assert [request.document_id for request in requests] == ["good"]
    assert len(refused) == 1
    assert message in str(refused[0])


def test_a_line_that_is_too_long_is_refused_and_the_next_one_read(folder, monkeypatch):
    monkeypatch.setattr(documents, "MAX_SOURCE_BYTES", 40)
    write_rows(folder / "a.jsonl", {"text": "x" * 100}, {"text": "good"})
    requests, refused = read("a.jsonl")
    assert [request.document_id for request in requests] == ["a.jsonl:2"]
    assert "over 40 bytes" in str(refused[0])


def test_an_empty_file_of_rows_is_refused(folder):
    (folder / "a.jsonl").write_bytes(b"\n")
    assert "is empty" in the_refusal("a.jsonl")


def test_standard_input_is_json_lines(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x"}\n{"text": "y", "id": "z"}\n')))
    assert [request.document_id for request in read("-")[0]] == ["stdin:1", "z"]
