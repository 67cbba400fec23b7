"""The bundled sample is what its README says: pytest tests/test_sample.py"""

from collections import Counter

import pytest

from ag_news import LABELS, SAMPLE, read_examples

SPLITS = {"train": 480, "test": 120}


@pytest.mark.parametrize("split, count", SPLITS.items())
def test_it_holds_as_many_items_of_every_class(split, count):
    examples = read_examples(SAMPLE / f"{split}.csv")
    labels = Counter(examples.labels)
    assert all(12 <= len(text.split()) <= 70 for text in examples.texts)
    assert labels == {label: count // 4 for label in range(len(LABELS))}
