"""spark.sources: names, tar shards on disk and behind a server, arrays, Hugging Face data sets, and what is wrong with them."""

import os
import pickle

import pytest

from spark.sources.names import Names


def test_names_are_kept_as_they_are():
    given = ["a.png", "", "ä b.jpg", os.fsdecode(b"caf\xe9.png"), "x" * 300]
    names = Names(given)
    assert list(names) == given
    assert names[-1] == given[-1]
    assert names[1:4] == given[1:4]
    with pytest.raises(IndexError):
        names[5]
    assert Names(iter(given)).digest() == names.digest() != Names(given[::-1]).digest()


def test_memory_of_names_is_their_length():
    count = 200_000
    names = Names(f"train/class{number % 1000:04}/{number:08}.jpg" for number in range(count))
    length = len("train/class0000/00000000.jpg")
    # 8 bytes a name beside the name, and nothing that grows with the number of Python objects.
    assert len(pickle.dumps(names)) < count * (length + 8) + 2000
    assert {type(value).__name__ for value in vars(names).values()} == {"ndarray"}
    assert pickle.loads(pickle.dumps(names))[123_456] == "train/class0456/00123456.jpg"
