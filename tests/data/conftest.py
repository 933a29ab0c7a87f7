"""A small data set on disk and a tokenizer for it, made once for all tests of the data path."""

import pytest
from fabricate import make_record, write_dataset

from rg_jax.data.sources import open_source
from rg_jax.data.tokenizer import Tokenizer, train_tokenizer
from rg_jax.grounding.format import OURS
from rg_jax.grounding.prompts import WORDINGS


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """made_up: 37 grounded CT records (train), 5 ungrounded ones (val), 3 of none of it (bare)."""
    data_dir = tmp_path_factory.mktemp("tfds")
    bare = [make_record(i, seed=3, languages=(), questions=0, grounded=False) for i in range(3)]
    write_dataset(
        data_dir,
        {
            "train": [make_record(i) for i in range(37)],
            "val": [make_record(i, seed=1, grounded=False, questions=1) for i in range(5)],
            "mixed": [make_record(i, seed=2) for i in range(4)] + bare,
            "bare": bare,
        },
    )
    pictures = [make_record(i, seed=4, modality="XR", languages=("en",)) for i in range(11)]
    write_dataset(data_dir, {"train": pictures}, name="pictures")
    return data_dir


@pytest.fixture(scope="session")
def train(data_dir):
    return open_source("made_up", "train", data_dir)


@pytest.fixture(scope="session")
def kept(data_dir):
    """The training records again, kept in memory."""
    return open_source("made_up", "train", data_dir, cache=True)


@pytest.fixture(scope="session")
def pictures(data_dir):
    return open_source("pictures", "train", data_dir)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [t for i in range(30) for row in make_record(i)["texts"].values() for t in row.values()]
    texts += [p for words in WORDINGS.values() for p in words.prompts.values()]
    train_tokenizer(texts, path, 2000)
    return Tokenizer.load(path, OURS.extra_tokens)
