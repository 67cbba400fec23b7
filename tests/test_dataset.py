"""Sources, splits, tokens and every rank's share of the rows: pytest tests/test_dataset.py"""

import gzip
import json
import shutil
import threading

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers
from filelock import FileLock

import ag_news
import dataset
from ag_news import LABELS, SourceError
from dataset import DataError, LengthGroupedSampler

ROWS = [("Storm hits coast", 0), ('They "won", twice', 1), ("Shares, up 3%", 2), ("A \\ comet", 3)]
TABLE = {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]}


def write(path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "\n".join(lines).encode(encoding) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def write_parquet(path, columns, class_names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if class_names:  # as `datasets` declares a ClassLabel
        features = {"label": {"names": class_names, "_type": "ClassLabel"}}
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pyarrow.parquet.write_table(table, path)
    return path


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def form(name):
    """ROWS as the lines of a CSV file in one of the forms, the title being the first word."""
    split = [(*text.split(" ", 1), label) for text, label in ROWS]
    if name == "text,label":
        return ["text,label", *(f"{quoted(text)},{label}" for text, label in ROWS)]
    if name == "names, index, other order":
        lines = [f"{LABELS[label].upper()},7,{quoted(text)}" for text, label in ROWS]
        return ["Label,,TEXT", *lines]
    lines = [f"{label + 1},{quoted(title)},{quoted(rest)}" for title, rest, label in split]
    return ["Class Index,Title,Description", *lines] if name == "kaggle" else lines


def prepare(choice, backbone, max_length=128):
    return dataset.prepare_data(ag_news.find_data(choice), backbone, max_length, None, None)


# Reading


def rows(examples):
    return list(zip(examples.texts, examples.labels, strict=True))


@pytest.mark.parametrize("name", ["text,label", "names, index, other order", "kaggle", "no header"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("file", ["train.csv", "train.csv.gz"])
def test_the_forms_in_circulation_read_alike(tmp_path, name, encoding, file):
    examples = ag_news.read_examples(write(tmp_path / file, form(name), encoding))
    assert rows(examples) == ROWS
    assert examples.ignored == (["(unnamed)"] if "index" in name else [])


def read_train(folder):
    files = next(filter(None, ag_news.split_files(folder, "train")))
    return ag_news.read_split(folder, "train", files)


def test_labels_that_pandas_wrote_as_floats_are_read(tmp_path):
    lines = ["text\tlabel", *(f"{text}\t{label}.0" for text, label in ROWS)]
    write(tmp_path / "train.tsv.gz", lines)
    assert rows(read_train(tmp_path)) == ROWS


def test_quoted_newlines_windows_line_ends_blank_lines_and_words_like_na_are_read(tmp_path):
    lines = ["text,label\r", "NA,0\r", '"two\r\nlines",1\r', "\r", "null,2\r", "nul\0,3\r"]
    found = rows(ag_news.read_examples(write(tmp_path / "train.csv", lines)))
    assert found == [("NA", 0), ("two\r\nlines", 1), ("null", 2), ("nul\0", 3)]


@pytest.mark.parametrize("file", ["train.jsonl", "train.json", "train.jsonl.gz", "train.json.gz"])
def test_json_lines_read_like_csv(tmp_path, file):
    lines = [json.dumps({"label_text": "-", "label": y, "text": x}) for x, y in ROWS]
    write(tmp_path / file, lines)
    examples = read_train(tmp_path)
    assert rows(examples) == ROWS and examples.ignored == ["label_text"]
    for indent in (None, 2):
        array = json.dumps(list(map(json.loads, lines)), indent=indent)
        write(tmp_path / file, [array])
        assert rows(read_train(tmp_path)) == ROWS
    write(tmp_path / file, ['[{"text": "a", "label": 0},', "7]"])
    refused(tmp_path / file, "row 2: expected a JSON object per row")
    write(tmp_path / file, ['[{"text": "a", "label": 0},'])
    refused(tmp_path / file, "")


@pytest.mark.parametrize(
    "labels, class_names",
    [
        ([0, 1, 2, 3], None),
        ([0.0, 1.0, 2.0, 3.0], None),
        (["world", "Sports", " Business", "sci/tech"], None),
        ([0, 1, 2, 3], list(LABELS)),
        ([3, 2, 1, 0], list(LABELS[::-1])),
    ],
)
def test_parquet_reads_like_csv_and_labels_are_taken_by_their_declared_name(
    tmp_path, labels, class_names
):
    columns = {"id": [b"a"] * 4, **TABLE, "label": labels}
    path = write_parquet(tmp_path / "label=3" / "train.parquet", columns, class_names)
    examples = ag_news.read_examples(path)
    assert rows(examples) == ROWS and examples.ignored == ["id"]


def test_a_folder_may_be_laid_out_as_the_hub_does(tmp_path):
    for i in range(4):
        columns = {name: column[i : i + 1] for name, column in TABLE.items()}
        write_parquet(tmp_path / "data" / f"train-0000{i}-of-00004.parquet", columns)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", TABLE)
    for folder in (tmp_path, tmp_path / "data"):
        assert [rows(split) for split in ag_news.read_folder(folder)] == [ROWS, ROWS]
    (tmp_path / "data" / "train-00002-of-00004.parquet").unlink()
    with pytest.raises(SourceError, match="3 train shards; expected 00004"):
        ag_news.read_folder(tmp_path)


@pytest.mark.parametrize(
    "place, name",
    [(".", "data-00000-of-00001.arrow"), (".", "0000.parquet"), ("default", "0000.parquet")],
)
def test_a_folder_of_each_split_is_read(tmp_path, place, name):
    """As save_to_disk of `datasets` writes it, and the Hub's branch refs/convert/parquet."""
    for split in ("train", "test"):
        path = write_parquet(tmp_path / place / split / name, TABLE, list(LABELS))
        if path.suffix == ".arrow":
            table = pyarrow.parquet.ParquetFile(path).read()
            with pyarrow.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
    assert [rows(split) for split in ag_news.read_folder(tmp_path)] == [ROWS, ROWS]
    if name == "0000.parquet":
        path.with_name("0002.parquet").write_bytes(path.read_bytes())
        with pytest.raises(SourceError, match="a file before 0002.parquet is missing"):
            ag_news.read_folder(tmp_path)


@pytest.mark.parametrize("place", ["data/{}.csv", "{0}/{0}.csv.gz", "data/{}.jsonl"])
def test_files_of_a_split_may_lie_one_folder_below(tmp_path, place):
    for split in ("train", "test"):
        path = tmp_path / place.format(split)
        path.parent.mkdir(exist_ok=True)
        lines = [json.dumps({"label": y, "text": x}) for x, y in ROWS]
        write(path, lines if "jsonl" in place else form("kaggle"))
    assert [rows(split) for split in ag_news.read_folder(tmp_path)] == [ROWS, ROWS]


def test_a_folder_that_may_not_be_entered_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *args: False)  # root may enter any
    with pytest.raises(SourceError, match=f"{tmp_path}: permission denied"):
        ag_news.read_folder(tmp_path)


def test_both_splits_are_taken_from_one_layout(tmp_path):
    write(tmp_path / "test.csv", ["text,label", "one of my own,1"])
    for split in ("train", "test"):  # a clone of the Hub's repository
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet", TABLE)
    assert [rows(split) for split in ag_news.read_folder(tmp_path)] == [ROWS, ROWS]
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()  # none has both
    assert rows(ag_news.read_folder(tmp_path)[1]) == [("one of my own", 1)]


def test_a_cell_may_be_long(tmp_path):
    write(tmp_path / "long.csv", ["text,label", f"{'long ' * 30_000},1"])
    assert len(ag_news.read_examples(tmp_path / "long.csv").texts[0]) > 131_072


def test_csv_is_taken_where_parquet_lies_beside_it(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", form("kaggle"))
        write_parquet(tmp_path / f"{split}.parquet", {"text": ["other"], "label": [0]})
    assert rows(ag_news.read_folder(tmp_path)[0]) == ROWS


def refused(path, says):
    with pytest.raises(SourceError) as caught:
        ag_news.read_examples(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "lines, says",
    [
        (["one,two"], "line 1: 2 columns"),
        (["text,label,Text", "a,0,b"], "line 1: two columns are named 'text'"),
        (["text,label", "a,0", "b,4"], "line 3: label '4'; expected 0 to 3"),
        (["text,label", "a,Health"], "line 2: label 'Health'"),
        (["1,a,b", "0,a,b"], "line 2: label '0'; expected 1 to 4"),
        (["text,label", '" ",1'], "line 2: no text"),
        (["text,label", "a,0", "b"], "line 3: 1 columns; the lines above have 2"),
        (["text,label", '"two\nlines",1', "a,9"], "line 4: label '9'"),
        (["text,label", "a,0", '"never closed,1', "b,2"], "line 3: unexpected end of data"),
        (["text,label", '"a \\"b\\" c",1'], "line 2: ',' expected after"),
        (["text,label"], "a header and no rows"),
        ([""], "0 columns"),
    ],
)
def test_a_mistake_in_csv_is_one_line_that_names_file_and_line(tmp_path, lines, says):
    refused(write(tmp_path / "train.csv", lines), says)


@pytest.mark.parametrize(
    "columns, class_names, says",
    [
        ({"text": ["a", None], "label": [0, 1]}, None, "row 2: no text, but None"),
        ({"text": [["a"], ["b"]], "label": [0, 1]}, None, "row 1: no text, but ['a']"),
        ({"text": [b"a", b"b"], "label": [0, 1]}, None, "row 1: no text, but b'a'"),
        ({"text": ["a", "b"], "label": [0, 1.5]}, None, "row 2: label '1.5'"),
        ({"text": ["a", "b"], "label": [0, 1]}, ["World", "Health"], "row 2: label 'Health'"),
        ({"text": ["a", "b"], "label": [0, -1]}, list(LABELS), 'row 2: label "-1 of ['),
        ({"text": ["a", "b"], "label": [0, 3]}, ["World", "Sports"], 'row 2: label "3 of ['),
    ],
)
def test_a_mistake_in_parquet_is_one_line_that_names_file_and_row(
    tmp_path, columns, class_names, says
):
    refused(write_parquet(tmp_path / "train.parquet", columns, class_names), says)


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"text": "a"}', "line 2: label 'None'"),
        ('{"text": null, "label": 1}', "line 2: no text"),
        ('{"text": "\\ud800", "label": 1}', "line 2: expected a JSON object"),
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected a JSON object per line; found a JSON list"),
        ("[" * 100_000, "line 2: expected a JSON object"),
    ],
)
def test_a_mistake_in_json_is_one_line_that_names_file_and_line(tmp_path, line, says):
    refused(write(tmp_path / "train.jsonl", ['{"text": "a", "label": 0}', line]), says)


def test_unreadable_files_are_one_line(tmp_path):
    latin = "text,label\n" + "a,0\n" * 50_000 + "caf\xe9,0\n"  # beyond any buffer
    (tmp_path / "latin.csv").write_bytes(latin.encode("latin-1"))
    refused(tmp_path / "latin.csv", "line 50002, byte 200014: not UTF-8")
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "train.parquet", "")
    for name in ("train.csv", "train.parquet", "train.csv.gz"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
        refused(tmp_path / name, "git lfs pull")
    lines = ["text\tlabel", '"He said\t0', "between\t1", 'and left"\t2']  # not quoted when written
    refused(write(tmp_path / "train.tsv", lines), "a quotation mark")
    cut = write(tmp_path / "train.csv.gz", form("kaggle"))
    cut.write_bytes(cut.read_bytes()[:-20])
    refused(cut, "")
    with pytest.raises(SourceError, match="has no test file"):
        ag_news.read_folder(write(tmp_path / "a" / "train.csv", form("kaggle")).parent)
    with pytest.raises(SourceError, match="no such folder"):
        ag_news.read_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["ag_news", "sample"])
def test_a_source_s_name_that_is_a_folder_too_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=f"--data ./{name}"):
        ag_news.find_data(name)


def test_too_few_rows_or_classes(tmp_path, tiny_backbone):
    write(tmp_path / "test.csv", form("text,label"))
    write(tmp_path / "train.csv", form("text,label")[:4])
    with pytest.raises(SourceError, match="no training row is labelled Sci/Tech"):
        prepare(str(tmp_path), tiny_backbone)
    write(tmp_path / "train.csv", form("text,label"))
    with pytest.raises(DataError, match="expected at least 2"):
        prepare(str(tmp_path), tiny_backbone)


# Choosing a source


@pytest.fixture
def nowhere(monkeypatch, tmp_path, news_folder):
    """No environment variable, no Kaggle input, no Hub; the sample is the tests' own news."""

    def no_hub():
        raise SourceError("the Hub does not answer")

    monkeypatch.delenv("AG_NEWS_DIR", raising=False)
    monkeypatch.setattr(ag_news, "KAGGLE_INPUT", tmp_path / "kaggle")
    monkeypatch.setattr(ag_news, "SAMPLE", news_folder)
    monkeypatch.setattr(ag_news, "read_hub", no_hub)
    return tmp_path


def test_auto_takes_the_sample_where_nothing_else_is_available_and_says_so(nowhere, tiny_backbone):
    data = prepare("auto", tiny_backbone)
    assert data.source == "sample" and "Hub does not answer" in data.why
    assert "not an AG News figure" in data.note
    assert prepare("sample", tiny_backbone).note == ""


def test_auto_prefers_the_hub_to_the_sample(nowhere, monkeypatch):
    monkeypatch.setattr(ag_news, "read_hub", lambda: ("train", "test"))
    assert ag_news.find_data("auto")[2] == "fancyzhx/ag_news"


@pytest.mark.parametrize("mount", ["m-ag-news", "datasets/someone/ag-news"])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_auto_takes_the_kaggle_input_whose_rows_are_all_ag_news(
    nowhere, monkeypatch, mount, suffix
):
    monkeypatch.setattr(ag_news, "read_hub", lambda: pytest.fail("the Hub was asked first"))
    kaggle = nowhere / "kaggle"
    write(kaggle / "a-titanic" / "train.csv", ["PassengerId,Survived", "1,0"])
    write(kaggle / "b-only-train" / "train.csv", form("kaggle"))
    for split in ("train", "test"):
        write(kaggle / "c-two-classes" / f"{split}.csv", ["text,label", "good,1", "bad,0"])
        six = [f"{i},title,description" for i in range(1, 7)]
        write(kaggle / "c-six-classes" / f"{split}.csv", six)
        write(kaggle / "z-later" / f"{split}.csv", ["text,label", *(f"z,{i}" for i in range(4))])
        path = kaggle / mount / f"{split}.{suffix}"
        write_parquet(path, TABLE) if suffix == "parquet" else write(path, form("kaggle"))
    train, _, source, *_ = ag_news.find_data("auto")
    assert source == f"Kaggle input {mount}" and rows(train) == ROWS


def test_auto_prefers_the_kaggle_input_with_as_many_rows_as_ag_news(nowhere, monkeypatch):
    monkeypatch.setattr(ag_news, "SIZES", (4, 4))
    for split in ("train", "test"):
        tweets = ["text,label", *(f"tweet {i},{i % 4}" for i in range(8))]
        write(nowhere / "kaggle" / "a-tweets" / f"{split}.csv", tweets)
        path = nowhere / "kaggle" / "news" / split / "0000.parquet"
        write_parquet(path, TABLE)
    assert ag_news.find_data("auto")[2] == "Kaggle input news"
    write_parquet(path.with_name("0001.parquet"), TABLE)
    assert ag_news.find_data("auto")[2] == "Kaggle input a-tweets"


def test_test_rows_that_are_training_rows_are_counted(tmp_path, news_folder, tiny_backbone):
    shutil.copytree(news_folder, tmp_path / "news")
    shutil.copy(news_folder / "train.csv", tmp_path / "news" / "test.csv")
    note = prepare(str(tmp_path / "news"), tiny_backbone).note
    assert "120 of 120 test rows are training rows as well" in note


def test_auto_prefers_ag_news_dir_to_all(nowhere, monkeypatch, news_folder):
    monkeypatch.setattr(ag_news, "read_kaggle", lambda: pytest.fail("Kaggle was looked at first"))
    monkeypatch.setenv("AG_NEWS_DIR", str(news_folder))
    assert ag_news.find_data("auto")[3] == "AG_NEWS_DIR is set"


def test_an_explicit_choice_never_falls_back(nowhere, monkeypatch):
    with pytest.raises(SourceError):
        ag_news.find_data("ag_news")
    monkeypatch.setenv("AG_NEWS_DIR", str(nowhere / "typo"))
    with pytest.raises(SourceError, match="AG_NEWS_DIR=.*no such folder"):
        ag_news.find_data("auto")


def test_a_kaggle_input_that_is_not_taken_is_named_with_its_fault(nowhere):
    lines = form("kaggle")
    write(nowhere / "kaggle" / "ag-news" / "train.csv", [*lines, "2,,"])
    write(nowhere / "kaggle" / "ag-news" / "test.csv", lines)
    _, _, source, why, _ = ag_news.find_data("auto")
    assert source == "sample" and f"line {len(lines) + 1}: no text" in why and "Hub" in why


# Splits and tokens


def test_validation_is_5_percent_of_every_class_and_always_the_same():
    labels = np.array([0] * 400 + [1] * 200 + [2] * 20 + [3] * 3)
    train, val = dataset.split_validation(labels)
    assert np.bincount(labels[val]).tolist() == [20, 10, 1, 1]
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert np.array_equal(val, dataset.split_validation(labels)[1])


def test_rows_keep_their_tokens_and_labels(news_folder, tiny_backbone):
    data = prepare(str(news_folder), tiny_backbone, 12)
    tokenizer = dataset.load_tokenizer(tiny_backbone)
    train, test = ag_news.read_folder(news_folder)
    _, val_rows = dataset.split_validation(np.array(train.labels))
    expected = {(train.texts[i], train.labels[i]) for i in val_rows}
    expected = sorted((tokenizer(t)["input_ids"][:11] + [3], label) for t, label in expected)
    found = sorted(
        (ids.tolist()[:11] + [3], label)
        for ids, label in map(data.val.__getitem__, range(len(data.val)))
    )
    assert found == expected  # [SEP] is 3, at the place where a row was cut or earlier
    assert len(data.train) + len(data.val) == 120 and len(data.test) == len(test.texts)
    assert data.train.lengths.max() == 12


def test_ignored_columns_and_the_highest_token_id_are_reported(
    tmp_path, news_folder, tiny_backbone
):
    shutil.copytree(news_folder, tmp_path / "news")
    lines = (news_folder / "train.csv").read_text().splitlines()
    numbered = ["Unnamed: 0," + lines[0], *(f"{i},{line}" for i, line in enumerate(lines[1:]))]
    write(tmp_path / "news" / "train.csv", numbered)
    data = prepare(str(tmp_path / "news"), tiny_backbone)
    assert "Unnamed: 0" in data.note and data.why == "set by --data"
    splits = (data.train, data.val, data.test)
    assert data.vocab_size == 1 + max(int(s[i][0].max()) for s in splits for i in range(len(s)))


def test_a_tokenizer_that_is_missing_corrupted_or_another_is_one_line(
    tmp_path, news_folder, tiny_backbone
):
    folder = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(DataError, match="cannot be read") as caught:
        dataset.load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(DataError, match="has no tokenizer.json"):
        dataset.load_tokenizer(folder)
    with pytest.raises(DataError, match=r"are \[UNK\]"):
        dataset.tokenize(["eins zwei drei vier"], tiny_backbone, 128)


@pytest.mark.parametrize(
    "words, says",
    [
        (62, "has 62 tokens, the weights have 65"),
        (66, "has 66 tokens, the weights have 65"),
        (0, "cannot be used"),
    ],
)
def test_a_vocabulary_of_another_size_is_refused(tmp_path, tiny_backbone, words, says):
    folder = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text(
        "".join(f"{word}\n" for word in [*vocabulary, "more"][:words])
    )
    if not words:
        (folder / "config.json").unlink()
    with pytest.raises(DataError, match=says) as caught:
        dataset.tokenize(["the bank"], folder, 128)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_would_not_be_served_alike_is_refused_or_corrected(
    tmp_path, tiny_backbone
):
    folder = shutil.copytree(tiny_backbone, tmp_path / "backbone")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "truncation_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ids, _ = dataset.tokenize(["bank " * 9 + "goal " * 9], folder, 11)
    assert ids[1] == ids[-2] == dataset.tokenize(["bank"], tiny_backbone, 11)[0][1]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    with pytest.raises(DataError, match=r"does not put \[CLS\]"):
        dataset.tokenize(["bank"], folder, 11)


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("cased", [True, False])
def test_a_cased_vocabulary_keeps_case_without_a_tokenizer_config(tmp_path, file, cased):
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] the bank".split() + ["The", "Bank"] * cased
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    if file == "tokenizer.json":
        tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), do_lower_case=not cased)
        tokenizer.backend_tokenizer.save(str(tmp_path / file))
        (tmp_path / "vocab.txt").unlink()
    tokenizer = dataset.load_tokenizer(tmp_path)
    found = tokenizer.convert_ids_to_tokens(tokenizer("The bank").input_ids)[1:3]
    assert found == (["The", "bank"] if cased else ["the", "bank"])


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a list that grows with each tokenisation."""
    calls, tokenize = [], dataset.tokenize
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))

    def counted(*args):
        calls.append(1)
        return tokenize(*args)

    monkeypatch.setattr(dataset, "tokenize", counted)
    return calls, tmp_path / "cache"


def test_texts_are_tokenised_once_for_all_processes(cache, tiny_backbone):
    calls, _ = cache
    texts, results = ["new shares of the bank"] * 50, []

    def work():
        results.append(dataset.cached_tokens(texts, tiny_backbone, 128)[0])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and len(results) == 4
    assert all(np.array_equal(results[0], other) for other in results)
    dataset.cached_tokens([*texts, "one more"], tiny_backbone, 128)
    dataset.cached_tokens(texts, tiny_backbone, 64)
    other = shutil.copytree(tiny_backbone, cache[1].parent / "other")
    (other / "added_tokens.json").write_text("{}")
    dataset.cached_tokens(texts, other, 128)
    assert len(calls) == 4  # other texts, another length, another tokenizer: other files


@pytest.mark.parametrize("size", [0, 100, -20])
def test_a_corrupted_cache_file_is_written_again(cache, tiny_backbone, size):
    calls, folder = cache
    ids, _ = dataset.cached_tokens(["the match"], tiny_backbone, 128)
    (file,) = (folder / "distrinews").glob("*.npz")
    file.write_bytes(file.read_bytes()[:size])
    for _ in range(2):
        assert np.array_equal(dataset.cached_tokens(["the match"], tiny_backbone, 128)[0], ids)
    assert len(calls) == 2
    assert not list((folder / "distrinews").glob("*.tmp"))


def test_a_lock_that_is_never_released_does_not_wait_for_ever(
    cache, tiny_backbone, monkeypatch, capsys
):
    _, folder = cache
    ids, _ = dataset.cached_tokens(["the match"], tiny_backbone, 128)
    (file,) = (folder / "distrinews").glob("*.npz")
    file.unlink()
    monkeypatch.setattr(dataset, "LOCK_TIMEOUT", 0.1)
    with FileLock(file.with_suffix(".lock")):
        assert np.array_equal(dataset.cached_tokens(["the match"], tiny_backbone, 128)[0], ids)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_no_error(cache, tiny_backbone):
    _, folder = cache
    folder.write_text("a file where the folder should be")
    assert len(dataset.cached_tokens(["the match"], tiny_backbone, 128)[0]) == 4


# Batches


def test_a_batch_is_padded_to_its_own_longest_row():
    batch = [(torch.tensor([2, 9, 3], dtype=torch.int32), 1), (torch.tensor([2, 3]), 0)]
    input_ids, attention_mask, labels = dataset.collate(batch)
    assert input_ids.tolist() == [[2, 9, 3], [2, 3, 0]] and input_ids.dtype == torch.int64
    assert attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert labels.tolist() == [1, 0] and labels.dtype == torch.int64


def tokenized(lengths):
    ids = np.zeros(lengths.sum(), np.int32)
    every = np.arange(len(lengths))
    return dataset.TokenizedExamples(ids, np.cumsum(lengths), every % 4, every)


def epoch_steps(lengths, global_batch_size, world_size, epoch=0, start_step=0, seed=0):
    """The rows of every step, an array of (steps, ranks, rows of a rank)."""
    ranks = []
    for rank in range(world_size):
        data = tokenized(lengths)
        sampler = LengthGroupedSampler(data, global_batch_size, world_size, rank, seed)
        sampler.set_epoch(epoch)
        sampler.start_step = start_step
        mine = list(sampler)
        assert len(mine) == len(sampler)
        ranks.append(np.array(mine).reshape(-1, global_batch_size // world_size))
    return np.stack(ranks, axis=1)


LENGTHS = np.random.default_rng(0).integers(5, 60, 5000)  # 208 steps of 24, and 8 rows left out


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_a_step_trains_on_the_same_rows_at_every_world_size(world_size):
    alone = epoch_steps(LENGTHS, 24, 1)
    shared = epoch_steps(LENGTHS, 24, world_size)
    assert shared.shape == (208, world_size, 24 // world_size)
    flat = [np.sort(steps.reshape(208, 24)) for steps in (alone, shared)]
    assert np.array_equal(*flat)
    rest = epoch_steps(LENGTHS, 24, world_size, start_step=70)  # resumed in the second window
    assert np.array_equal(rest, shared[70:])


def test_the_order_is_a_function_of_seed_and_epoch_and_leaves_out_other_rows_each_time():
    orders = [epoch_steps(LENGTHS, 24, 2, epoch, 0, seed) for epoch in (0, 1) for seed in (0, 1)]
    assert all(len(np.unique(steps)) == steps.size == 208 * 24 for steps in orders)
    assert len({frozenset(range(len(LENGTHS))) - {*steps.flat} for steps in orders}) == 4
    assert np.array_equal(orders[0], epoch_steps(LENGTHS, 24, 2))


def test_fewer_rows_than_one_step_are_refused():
    with pytest.raises(DataError, match="--global-batch-size 23"):
        LengthGroupedSampler(tokenized(LENGTHS[:23]), 24)
    assert epoch_steps(LENGTHS[:24], 24, 2).shape == (1, 2, 12)


def test_all_ranks_have_equally_much_to_do_and_little_of_it_is_padding():
    # 55,080 lengths with the percentiles of AG News: 5 % are below 31 tokens, half below 50, ...
    at = [0, 5, 25, 50, 75, 95, 99, 100]
    tokens = [12, 31, 43, 50, 59, 79, 122, 128]
    draw = np.random.default_rng(0).uniform(0, 100, 55_080)
    lengths = np.interp(draw, at, tokens).round().astype(int)
    steps = lengths[epoch_steps(lengths, 256, 2)].reshape(-1, 2, 4, 32)  # micro-batches of 32
    padded = 32 * steps.max(axis=3).sum(axis=2)  # tokens of a rank in a step
    assert (padded.max(axis=1) / padded.mean(axis=1) - 1).mean() <= 0.002
    assert padded.sum() / steps.sum() <= 1.03
