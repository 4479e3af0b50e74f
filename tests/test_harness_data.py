"""Labelled text: what the standard library gives, files good and bad, datasets."""

import json
import os
import subprocess
import sys
import types

import pytest

from fastlayers.harness import UserError, data


@pytest.fixture(scope="module")
def stdlib():
    return data.stdlib_docstrings()


def test_stdlib_docstrings_are_many_balanced_and_distinct(stdlib):
    sizes = stdlib.sizes
    examples = [text for text, _ in stdlib.train + stdlib.test]
    assert sorted(sizes) == sorted(data.STDLIB_FAMILIES)
    assert len(sizes) >= 8 and len(examples) >= 1500
    assert max(sizes.values()) <= 2 * min(sizes.values())
    assert len(set(examples)) == len(examples)
    assert 0.15 < len(stdlib.test) / len(examples) < 0.25
    assert {label for _, label in stdlib.test} == set(range(len(sizes)))


def test_stdlib_split_is_the_same_under_another_hash_seed(stdlib):
    program = "from fastlayers.harness import data; print(data.stdlib_docstrings())"
    environment = {**os.environ, "PYTHONHASHSEED": "1234"}
    finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == f"{stdlib}\n"


def test_a_text_stays_on_its_side_when_others_come_and_go():
    examples = [(f"text number {number}", "ab"[number % 2]) for number in range(200)]
    whole, half = data.split("whole", examples), data.split("half", examples[50:150])
    assert set(half.test) <= set(whole.test) and set(half.train) <= set(whole.train)


def test_every_class_has_examples_on_both_sides_however_small():
    examples = [(f"{label} {number}", label) for label in "abcdefgh" for number in range(2)]
    texts = data.split("small", examples)
    assert {label for _, label in texts.train} == {label for _, label in texts.test} == set(range(8))


ROWS = [("good text", "yes"), ("bad text", "no"), ("fine text", "yes"), ("poor, text", "no")]


def write(path, columns=("text", "label"), rows=ROWS):
    if path.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(columns, row))) for row in rows]
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(f'"{cell}"' for cell in row) for row in (columns, *rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_files_of_every_kind_give_the_same_examples(tmp_path, suffix):
    texts = data.read_file(write(tmp_path / f"data.{suffix}"))
    assert texts.labels == ["no", "yes"]
    assert sorted((text, texts.labels[label]) for text, label in texts.train + texts.test) == sorted(ROWS)
    assert texts.bad_rows == []


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_other_columns_can_be_named_and_a_missing_one_is(tmp_path, suffix):
    path = write(tmp_path / f"data.{suffix}", columns=("body", "kind"))
    assert data.read_file(path, "body", "kind").labels == ["no", "yes"]
    with pytest.raises(UserError, match=r"no column 'text'; its columns are body, kind \(choose with --text-column\)"):
        data.read_file(path)
    with pytest.raises(UserError, match=r"no column 'sort'.*--label-column"):
        data.read_file(path, "body", "sort")


def test_bad_rows_of_a_csv_file_are_named(tmp_path):
    path = write(tmp_path / "data.csv")
    path.write_text(path.read_text() + 'only one field\n"",yes\nno label,\na,b,c\n')
    texts = data.read_file(path)
    assert len(texts.train) + len(texts.test) == len(ROWS)
    assert sorted(texts.bad_rows) == [
        "line 6: 1 fields, wanted 2",
        "line 7: no text in column 'text'",
        "line 8: no label in column 'label'",
        "line 9: 3 fields, wanted 2",
    ]


def test_bad_rows_of_a_jsonl_file_are_named(tmp_path):
    path = write(tmp_path / "data.jsonl")
    path.write_text(path.read_text() + '{"text": "cut off\n[1]\n{"text": 5, "label": "yes"}\n{"text": "no label"}\n')
    texts = data.read_file(path)
    assert len(texts.train) + len(texts.test) == len(ROWS)
    assert [row.split(" (")[0] for row in sorted(texts.bad_rows)] == [
        "line 5: not JSON",
        "line 6: not a JSON object",
        "line 7: no text in column 'text'",
        "line 8: no label in column 'label'",
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.xlsx", "", "wanted a file that ends in .csv, .tsv or .jsonl"),
        ("data.csv", "", "no column 'text'; its columns are none"),
        ("data.csv", "text,label\n", "wanted at least 2 labels, found none"),
        ("data.csv", "text,label\na,x\nb,x\n", "wanted at least 2 labels, found x"),
        ("data.csv", "text,label\na,x\nb,x\nc,y\n", "label 'y' has one text"),
        ("data.csv", b"text,label\n\xff\xfe,x\n", "not a UTF-8 csv file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        data.read_file(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        data.read_file(tmp_path / "data.csv")


class Part(list):
    """Rows of a dataset, with the two attributes that are used of datasets.Dataset."""

    def __init__(self, rows, names=None):
        super().__init__(rows)
        self.column_names = list(rows[0])
        self.features = {"label": types.SimpleNamespace(names=names)} if names else {}


def stand_in(monkeypatch, parts):
    def load_dataset(name):
        if name != "known":
            raise FileNotFoundError(f"Couldn't find {name}")
        return parts

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_a_dataset_with_class_names_and_a_test_part(monkeypatch):
    train, test = ([{"text": f"{part} {n}", "label": n % 2} for n in range(6)] for part in ("train", "test"))
    stand_in(monkeypatch, {"train": Part(train, ["no", "yes"]), "test": Part(test, ["no", "yes"])})
    texts = data.load_dataset("known")
    assert texts.labels == ["no", "yes"] and len(texts.train) == len(texts.test) == 6
    with pytest.raises(UserError, match="Couldn't find unknown"):
        data.load_dataset("unknown")
    with pytest.raises(UserError, match="no column 'body'"):
        data.load_dataset("known", "body")


def test_a_dataset_with_one_part_is_split_and_its_bad_rows_named(monkeypatch):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(40)]
    stand_in(monkeypatch, {"train": Part([*rows, {"text": None, "label": "a"}])})
    texts = data.load_dataset("known")
    assert len(texts.train) + len(texts.test) == 40 and texts.test
    assert texts.bad_rows == ["train row 40: no text in column 'text'"]


def test_a_dataset_whose_test_part_has_an_unknown_label(monkeypatch):
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(4)]
    stand_in(monkeypatch, {"train": Part(rows), "test": Part([{"text": "t", "label": "c"}])})
    with pytest.raises(UserError, match="label 'c' has test examples but none to train on"):
        data.load_dataset("known")


def test_without_the_datasets_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match='--dataset known needs the datasets library: pip install "datasets"'):
        data.load_dataset("known")
