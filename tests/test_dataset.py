"""Sources, splits, tokens and every rank's share of the rows: pytest tests/test_dataset.py"""

import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

import dataset
from dataset import DataError, LengthWindows

ROWS = [("Storm hits coast", 0), ('They "won", twice', 1), ("Shares, up 3%", 2), ("A \\ comet", 3)]


def write(path, lines, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("\n".join(lines).encode(encoding) + b"\n")
    return path


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def form(name):
    """ROWS as the lines of a CSV file in one of the three forms, the title being the first word."""
    split = [(*text.split(" ", 1), label) for text, label in ROWS]
    if name == "text,label":
        return ["text,label", *(f"{quoted(text)},{label}" for text, label in ROWS)]
    lines = [f"{label + 1},{quoted(title)},{quoted(rest)}" for title, rest, label in split]
    return ["Class Index,Title,Description", *lines] if name == "kaggle" else lines


# Reading


@pytest.mark.parametrize("name", ["text,label", "kaggle", "no header"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_three_forms_read_alike(tmp_path, name, encoding):
    news = dataset.read_news(write(tmp_path / "train.csv", form(name), encoding))
    assert list(zip(news.texts, news.labels, strict=True)) == ROWS


def test_parquet_reads_like_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts, labels = zip(*ROWS, strict=True)
    table = pyarrow.table({"text": texts, "label": labels})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    news = dataset.read_news(tmp_path / "train.parquet")
    assert list(zip(news.texts, news.labels, strict=True)) == ROWS


@pytest.mark.parametrize(
    "lines, says",
    [
        (["one,two"], "line 1: 2 columns"),
        (["5,title,text"], "line 1: 3 columns that begin '5'"),
        (["text,label", "a,0", "b,4"], "line 3: label '4'; expected 0 to 3"),
        (["text,label", "a,Sports"], "line 2: label 'Sports'"),
        (["text,label", "a,"], "line 2: label ''"),
        (["1,a,b", "0,a,b"], "line 2: label '0'; expected 1 to 4"),
        (["Class Index,Title,Description", "5,a,b"], "line 2: label '5'"),
        (["text,label", '" ",1'], "line 2: no text"),
        (["text,label", "a,0", "b"], "line 3: 1 columns; the lines above have 2"),
        (["text,label", '"two\nlines",1', "a,9"], "line 4: label '9'"),
        (["text,label", '"never closed,1'], "line 2: unexpected end of data"),
        (["text,label"], "has a header and no rows"),
        ([""], "is empty"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_and_line(tmp_path, lines, says):
    path = write(tmp_path / "train.csv", lines)
    with pytest.raises(DataError) as caught:
        dataset.read_news(path)
    assert says in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_unusable_files_are_one_line_too(tmp_path):
    latin = tmp_path / "train.csv"
    latin.write_bytes(b"text,label\ncaf\xe9,0\n")
    with pytest.raises(DataError, match="not UTF-8"):
        dataset.read_news(latin)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        dataset.read_news(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="has no test.csv or test.parquet"):
        dataset.read_folder(write(tmp_path / "a" / "train.csv", form("kaggle")).parent)
    with pytest.raises(DataError, match="no such folder"):
        dataset.read_folder(tmp_path / "nowhere")


def test_too_few_rows_or_classes(tmp_path, tiny_backbone):
    write(tmp_path / "test.csv", form("text,label"))
    write(tmp_path / "train.csv", form("text,label")[:4])
    with pytest.raises(DataError, match="no training row is labelled Sci/Tech"):
        dataset.prepare_data(str(tmp_path), tiny_backbone, 128, None, None)
    sampler = DistributedSampler(range(2), 3, 0)
    with pytest.raises(DataError, match="2 training rows for 3 processes"):
        LengthWindows(sampler, np.array([5, 6]), 3)


# Choosing a source


@pytest.fixture
def nowhere(monkeypatch, tmp_path, news_folder):
    """No environment variable, no Kaggle input, no Hub; the sample is the tests' own news."""

    def no_hub():
        raise DataError("the Hub does not answer")

    monkeypatch.delenv("AG_NEWS_DIR", raising=False)
    monkeypatch.setattr(dataset, "KAGGLE_INPUT", tmp_path / "kaggle")
    monkeypatch.setattr(dataset, "SAMPLE", news_folder)
    monkeypatch.setattr(dataset, "read_hub", no_hub)
    return tmp_path


def test_auto_takes_the_sample_where_nothing_else_is_to_be_had_and_says_so(nowhere, tiny_backbone):
    data = dataset.prepare_data("auto", tiny_backbone, 128, None, None)
    assert data.source == "sample" and "Hub does not answer" in data.why
    assert "not an AG News figure" in data.note
    assert dataset.prepare_data("sample", tiny_backbone, 128, None, None).note == ""


def test_auto_prefers_the_hub_to_the_sample(nowhere, monkeypatch):
    monkeypatch.setattr(dataset, "read_hub", lambda: ("train", "test"))
    assert dataset.read_source("auto")[2] == "fancyzhx/ag_news"


@pytest.mark.parametrize("mount", ["ag-news", "datasets/someone/ag-news"])
def test_auto_finds_a_kaggle_input_that_reads_as_ag_news(nowhere, monkeypatch, mount):
    monkeypatch.setattr(dataset, "read_hub", lambda: pytest.fail("the Hub was asked first"))
    write(nowhere / "kaggle" / "a-titanic" / "train.csv", ["PassengerId,Survived", "1,0"])
    write(nowhere / "kaggle" / "b-only-train" / "train.csv", form("kaggle"))
    for split in ("train", "test"):
        write(nowhere / "kaggle" / mount / f"{split}.csv", form("kaggle"))
    train, _, source, _ = dataset.read_source("auto")
    assert source == "Kaggle input ag-news" and train.texts == [text for text, _ in ROWS]


def test_auto_prefers_ag_news_dir_to_all(nowhere, monkeypatch, news_folder):
    monkeypatch.setattr(dataset, "kaggle_folder", lambda: pytest.fail("Kaggle was looked at first"))
    monkeypatch.setenv("AG_NEWS_DIR", str(news_folder))
    assert dataset.read_source("auto")[3] == "AG_NEWS_DIR is set"


def test_a_source_named_outright_never_falls_back(nowhere, monkeypatch):
    with pytest.raises(DataError):
        dataset.read_source("ag_news")
    monkeypatch.setenv("AG_NEWS_DIR", str(nowhere / "typo"))
    with pytest.raises(DataError, match="no such folder"):
        dataset.read_source("auto")


# Splits and tokens


def test_validation_is_5_percent_of_every_class_and_always_the_same():
    labels = np.array([0] * 400 + [1] * 200 + [2] * 20 + [3] * 3)
    train, val = dataset.split_validation(labels)
    assert np.bincount(labels[val]).tolist() == [20, 10, 1, 1]
    assert sorted([*train, *val]) == list(range(len(labels)))
    assert np.array_equal(val, dataset.split_validation(labels)[1])


def test_rows_keep_their_tokens_and_labels(news_folder, tiny_backbone):
    data = dataset.prepare_data(str(news_folder), tiny_backbone, 12, None, None)
    tokenizer = dataset.load_tokenizer(tiny_backbone)
    train, test = dataset.read_folder(news_folder)
    _, val_rows = dataset.split_validation(np.array(train.labels))
    expected = {(train.texts[i], train.labels[i]) for i in val_rows}
    expected = sorted((tokenizer(t)["input_ids"][:11] + [3], label) for t, label in expected)
    found = sorted((ids.tolist()[:11] + [3], label) for ids, label in map(data.val.__getitem__,
                                                                        range(len(data.val))))
    assert found == expected  # [SEP] is 3, at the place where a row was cut or earlier
    assert len(data.train) + len(data.val) == 120 and len(data.test) == len(test.texts)
    assert data.train.lengths.max() == 12


def test_a_negative_item_is_the_same_row_with_its_label_ignored(news_folder, tiny_backbone):
    train = dataset.prepare_data(str(news_folder), tiny_backbone, 128, None, None).train
    for i in (0, 5):
        assert torch.equal(train[i][0], train[-1 - i][0])
        assert train[-1 - i][1] == -100


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
    texts, results = ["new shares rose"] * 50, []

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
    assert len(calls) == 3  # other texts, another length: other files


def test_a_damaged_cache_is_written_again(cache, tiny_backbone):
    calls, folder = cache
    ids, _ = dataset.cached_tokens(["the match"], tiny_backbone, 128)
    (file,) = (folder / "distrinews").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(dataset.cached_tokens(["the match"], tiny_backbone, 128)[0], ids)
    dataset.cached_tokens(["the match"], tiny_backbone, 128)
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_no_error(cache, tiny_backbone):
    _, folder = cache
    folder.write_text("a file where the folder should be")
    assert len(dataset.cached_tokens(["the match"], tiny_backbone, 128)[0]) == 4


# Batches


def test_a_batch_is_padded_to_its_own_longest_row():
    rows = [(torch.tensor([2, 9, 3]), 1), (torch.tensor([2, 3]), -100)]
    input_ids, attention_mask, labels = dataset.collate(rows)
    assert input_ids.tolist() == [[2, 9, 3], [2, 3, 0]]
    assert attention_mask.tolist() == [[True, True, True], [True, True, False]]
    assert labels.tolist() == [1, -100]


def shares(lengths, global_batch_size, world_size, epoch=0, start=0, set_epoch=True):
    """The steps of every rank."""
    every = []
    for rank in range(world_size):
        sampler = DistributedSampler(lengths, world_size, rank)
        if set_epoch:
            sampler.set_epoch(epoch)
        steps = LengthWindows(sampler, lengths, global_batch_size)
        steps.start = start
        every.append(list(steps))
    return every


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [84, 85, 100, 1000, 83])
def test_every_row_counts_once_an_epoch_in_equal_steps(world_size, rows):
    lengths = np.random.default_rng(0).integers(5, 60, rows)
    every = shares(lengths, 84, world_size)
    counted = sorted(i for rank in every for step in rank for i in step if i >= 0)
    assert counted == list(range(rows))
    for number, step in enumerate(zip(*every, strict=True)):
        assert len({len(part) for part in step}) == 1  # so ranks cut equally many micro-batches
        real = sum(i >= 0 for part in step for i in part)
        assert real == min(84, rows - 84 * number)


def test_the_order_is_a_function_of_the_epoch():
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    assert shares(lengths, 32, 2, epoch=0) != shares(lengths, 32, 2, epoch=1)
    assert shares(lengths, 32, 2, epoch=1) == shares(lengths, 32, 2, epoch=1)
    forgotten = [shares(lengths, 32, 2, epoch, set_epoch=False) for epoch in (0, 1)]
    assert forgotten[0] == forgotten[1]


def test_a_later_start_gives_the_rest_of_the_same_steps():
    lengths = np.random.default_rng(0).integers(5, 60, 500)
    whole, rest = shares(lengths, 32, 2), shares(lengths, 32, 2, start=7)
    assert [rank[7:] for rank in whole] == rest


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("micro", [16, 32])
def test_steps_cost_all_ranks_alike_and_little_is_padding(world_size, micro):
    # 55,080 lengths with the percentiles of AG News: 5 % are below 31 tokens, half below 50, ...
    at = [0, 5, 25, 50, 75, 95, 99, 100]
    tokens = [12, 31, 43, 50, 59, 79, 122, 128]
    draw = np.random.default_rng(0).uniform(0, 100, 55_080)
    lengths = np.interp(draw, at, tokens).round().astype(int)
    every = shares(lengths, micro * world_size, world_size)
    cost = np.array([[len(s) * max(lengths[max(i, -1 - i)] for i in s) for s in r] for r in every])
    assert (cost.max(0) / cost.mean(0) - 1).mean() <= 0.02
    assert cost.sum() / lengths.sum() <= 1.03


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_rows_are_on_exactly_one_rank(news_folder, tiny_backbone, world_size):
    test = dataset.prepare_data(str(news_folder), tiny_backbone, 128, None, None).test
    loaders = [dataset.eval_loader(test, 4, rank, world_size) for rank in range(world_size)]
    rows = sorted(i for loader in loaders for batch in loader.batch_sampler for i in batch)
    assert rows == list(range(53))
