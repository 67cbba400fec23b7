"""The bundled sample is what its README says: pytest tests/test_sample.py"""

import re
from collections import Counter

import pytest

from dataset import LABELS, SAMPLE, read_examples

SPLITS = {"train": 480, "test": 120}


def words(text):
    return re.findall(r"[a-z0-9']+", text.lower())


@pytest.mark.parametrize("split, count", SPLITS.items())
def test_it_holds_as_many_items_of_every_class(split, count):
    labels = Counter(read_examples(SAMPLE / f"{split}.csv").labels)
    assert labels == {label: count // 4 for label in range(len(LABELS))}


def test_items_have_12_to_70_words_and_no_two_are_alike():
    texts = [text for split in SPLITS for text in read_examples(SAMPLE / f"{split}.csv").texts]
    assert all(12 <= len(text.split()) <= 70 for text in texts)
    seen = {}
    for i, text in enumerate(texts):  # no two share seven words in a row
        tokens = words(text)
        for run in zip(*(tokens[k:] for k in range(7)), strict=False):
            assert seen.setdefault(run, i) == i, (texts[seen[run]], text)
    openings = Counter(tuple(words(text)[:3]) for text in texts)
    assert max(openings.values()) <= 2
