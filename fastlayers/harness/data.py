"""Labelled text: the standard library's documentation strings, a CSV, TSV or JSONL file, or a Hugging Face dataset."""

import ast
import csv
import hashlib
import json
import sysconfig
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from fastlayers.harness import UserError
from fastlayers.harness.dataset import TEST_SHARE, class_sizes

# Class -> packages and modules of the Python standard library whose documentation strings it holds. Only such as exist
# in every Python from 3.10 on and in the stripped installations of Linux distributions (no tkinter, no idlelib).
STDLIB_FAMILIES = {
    "archives": ("bz2", "gzip", "lzma", "shutil", "tarfile", "zipfile", "zipimport"),
    "asyncio": ("asyncio",),
    "concurrency": ("concurrent", "multiprocessing", "queue", "sched", "subprocess", "threading"),
    "datetime": ("_pydatetime", "_strptime", "calendar", "datetime", "zoneinfo"),
    "debugging": ("bdb", "cProfile", "doctest", "pdb", "profile", "pstats", "trace", "traceback", "unittest"),
    "email": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "files": ("_pyio", "fileinput", "glob", "ntpath", "os", "pathlib", "posixpath", "tempfile"),
    "imports": ("importlib", "modulefinder", "pkgutil", "runpy", "site", "sysconfig"),
    "inspection": ("ast", "dis", "enum", "inspect", "pickletools", "pydoc", "symtable", "typing"),
    "internet": ("ftplib", "html", "http", "socketserver", "ssl", "urllib", "wsgiref", "xmlrpc"),
    "logging": ("logging", "warnings"),
    "numbers": ("_pydecimal", "fractions", "ipaddress", "numbers", "random", "statistics", "uuid"),
    "text": ("argparse", "codecs", "configparser", "difflib", "locale", "optparse", "re", "string", "textwrap"),
    "xml": ("xml",),
}
STDLIB_WORDS = 8  # shorter documentation strings say too little
STDLIB_PER_CLASS = 120  # at most so many a class: the classes stay balanced and one epoch short


@dataclass
class TextData:
    source: str
    labels: list[str]
    train: list[tuple[str, int | tuple[int, ...]]]  # (text, index into labels, or one for each label that holds)
    test: list[tuple[str, int | tuple[int, ...]]]
    bad_rows: list[str] = field(default_factory=list)  # "line 7: empty text"; left out of train and test

    @property
    def several(self):
        """Whether a text can have several labels at once."""
        return isinstance(self.train[0][1], tuple)

    @property
    def sizes(self):
        return class_sizes([label for _, label in self.train + self.test], self.labels)


def stdlib_docstrings():
    """Documentation strings of this Python's standard library, labelled by the family of modules they come from.

    The sources are parsed, not imported. White space is folded; strings under STDLIB_WORDS words, duplicates, and
    strings that several families share are left out; of each class the STDLIB_PER_CLASS with the smallest SHA-256
    stay. Which examples there are depends on the text of the Python version alone (most are the same from 3.10 to
    3.13), and on which side of the split one falls on its own text alone.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    families_of = defaultdict(set)
    for family, modules in STDLIB_FAMILIES.items():
        for module in modules:
            for text in _docstrings_of(stdlib, module):
                families_of[text].add(family)
    by_family = defaultdict(list)
    for text in sorted(families_of, key=_digest):
        if len(families_of[text]) == 1 and len(by_family[next(iter(families_of[text]))]) < STDLIB_PER_CLASS:
            by_family[next(iter(families_of[text]))].append(text)
    examples = [(text, family) for family in sorted(by_family) for text in by_family[family]]
    return split("documentation strings of the Python standard library", examples)


def _docstrings_of(stdlib, module):
    package = stdlib / module
    paths = sorted(package.rglob("*.py")) if package.is_dir() else [stdlib / f"{module}.py"]
    paths = [path for path in paths if path.is_file() and not {"test", "tests"} & set(path.relative_to(stdlib).parts)]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented):
                words = (ast.get_docstring(node) or "").split()
                if len(words) >= STDLIB_WORDS:
                    yield " ".join(words)


def read_file(path, text_column="text", label_column="label", separator=None):
    """Examples of a .csv, .tsv or .jsonl file, with rows that are no example counted and named in bad_rows.

    separator: what stands between the labels of an example that has several at once; None: each has one
    raises  UserError for a file that cannot be read, a missing column, or a label with fewer than two examples
    """
    path = Path(path)
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path.name}: wanted a file that ends in .csv, .tsv or .jsonl")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        rows, columns, bad_rows = readers[path.suffix.lower()](path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path.name}: not a UTF-8 {path.suffix[1:]} file ({error})") from error
    examples = _labelled(path.name, rows, columns, text_column, label_column, bad_rows)
    if separator is not None:
        return split_several(path.name, examples, separator, bad_rows)
    return split(path.name, examples, bad_rows)


def _read_csv(path):
    """rows [(line, {column: value})], columns, bad rows; the first line names the columns."""
    rows, bad_rows = [], []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        columns = reader.fieldnames or []
        for row in reader:
            count = len(columns) + len(row.pop(None, ())) - sum(value is None for value in row.values())
            if count == len(columns):
                rows.append((f"line {reader.line_num}", row))
            else:
                bad_rows.append(f"line {reader.line_num}: {count} fields, wanted {len(columns)}")
    return rows, columns, bad_rows


def _read_jsonl(path):
    """rows [(line, {column: value})], columns, bad rows; one JSON object a line."""
    rows, columns, bad_rows = [], {}, []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            bad_rows.append(f"line {number}: not JSON ({error.msg})")
            continue
        if isinstance(row, dict):
            rows.append((f"line {number}", row))
            columns.update(row)
        else:
            bad_rows.append(f"line {number}: not a JSON object")
    return rows, list(columns), bad_rows


def _labelled(source, rows, columns, text_column, label_column, bad_rows):
    """(text, label) of each row that has both; the others are named in bad_rows."""
    for column, option in ((text_column, "--text-column"), (label_column, "--label-column")):
        if column not in columns:
            there = ", ".join(map(str, columns)) or "none"
            raise UserError(f"{source}: no column {column!r}; its columns are {there} (choose with {option})")
    examples = []
    for where, row in rows:
        text, label = row.get(text_column), row.get(label_column)
        if not isinstance(text, str) or not text.strip():
            bad_rows.append(f"{where}: no text in column {text_column!r}")
        elif not isinstance(label, str | int) or not str(label).strip():
            bad_rows.append(f"{where}: no label in column {label_column!r}")
        else:
            examples.append((text, str(label).strip()))
    return examples


def load_dataset(name, text_column="text", label_column="label"):
    """Examples of a Hugging Face dataset (a name on the Hub, or a local folder). Its test or validation part is used
    where it has one, else its train part is split.

    raises  UserError without the datasets library, for a dataset it cannot load, a missing column or part
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f'--dataset {name} needs the datasets library: pip install "datasets"') from error
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:
        raise UserError(f"dataset {name}: {error}") from error
    if "train" not in parts:
        raise UserError(f"dataset {name}: no part 'train'; its parts are {', '.join(parts)}")
    bad_rows, examples = [], {}
    held_out = next((part for part in ("test", "validation") if part in parts), None)
    for part in filter(None, ("train", held_out)):
        rows = parts[part]
        names = getattr(rows.features.get(label_column), "names", None)
        named = [
            (f"{part} row {number}", {**row, label_column: names[row[label_column]]} if names else row)
            for number, row in enumerate(rows)
        ]
        examples[part] = _labelled(f"dataset {name}", named, rows.column_names, text_column, label_column, bad_rows)
    if held_out is None:
        return split(f"dataset {name}", examples["train"], bad_rows)
    return _indexed(f"dataset {name}", examples["train"], examples[held_out], bad_rows)


def split(source, examples, bad_rows=()):
    """Hold out the examples whose SHA-256 ends in the lowest fifth of its range; a text never changes its side.

    Where that leaves a class without a training or a test example, its text with the smallest SHA-256 is held out.
    """
    texts_of = defaultdict(set)
    for text, label in examples:
        texts_of[label].add(text)
    if len(texts_of) < 2:
        raise UserError(f"{source}: wanted at least 2 labels, found {', '.join(texts_of) or 'none'}")
    held_out = set()
    for label, texts in texts_of.items():
        if len(texts) < 2:
            raise UserError(f"{source}: label {label!r} has one text, wanted one to train on and one to test on")
        low = {text for text in texts if is_held_out(text)}
        held_out |= {(text, label) for text in (low if low and low != texts else {min(texts, key=_digest)})}
    train = [example for example in examples if example not in held_out]
    test = [example for example in examples if example in held_out]
    return _indexed(source, train, test, bad_rows)


def split_several(source, examples, separator, bad_rows=()):
    """The same of examples with several labels each, "red; round", by the text alone.

    raises  UserError where a label has no example on one of the two sides
    """
    train, test = [], []
    for text, label in examples:
        names = tuple(sorted({name.strip() for name in label.split(separator)} - {""}))
        (test if is_held_out(text) else train).append((text, names))
    labels = sorted({name for _, names in train + test for name in names})
    for part, missing in ((train, "to train on"), (test, "to test on")):
        lacking = sorted(set(labels) - {name for _, names in part for name in names})
        if lacking:
            raise UserError(f"{source}: label {lacking[0]!r} has no example {missing}")
    index = {label: number for number, label in enumerate(labels)}
    train, test = ([(text, tuple(index[name] for name in names)) for text, names in part] for part in (train, test))
    return TextData(source, labels, train, test, list(bad_rows))


def _indexed(source, train, test, bad_rows):
    labels = sorted({label for _, label in train})
    unknown = sorted({label for _, label in test} - set(labels))
    if unknown:
        raise UserError(f"{source}: label {unknown[0]!r} has test examples but none to train on")
    if len(labels) < 2:
        raise UserError(f"{source}: wanted at least 2 labels, found {', '.join(labels) or 'none'}")
    index = {label: number for number, label in enumerate(labels)}
    train, test = ([(text, index[label]) for text, label in part] for part in (train, test))
    return TextData(source, labels, train, test, list(bad_rows))


def is_held_out(text):
    """Whether the SHA-256 of the text ends in the lowest fifth of its range."""
    return int(_digest(text)[-8:], 16) < 2**32 // TEST_SHARE


def _digest(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
