"""Mention similarity: the offline default and the interface for a real model."""

import socket
import sys
import types

import made_up
import numpy as np
import pytest

from rg_jax.errors import UserError
from rg_jax.evaluation.embedder import ExactEmbedder, VectorEmbedder, load_embedder


def test_exact_text_or_class():
    reference = [("Liver", 5), ("nodule", 0), ("Niere", 2)]
    predicted = [("liver", 0), ("Leber", 5), ("mass", 0), ("Nodule", 0), ("Niere", 3)]
    np.testing.assert_array_equal(
        ExactEmbedder().similarity(reference, predicted),
        [[1, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]],
    )
    assert ExactEmbedder().similarity([], predicted).shape == (0, 5)


def test_vectors_are_compared_by_cosine_and_asked_for_once():
    asked = []

    def encode(texts):
        asked.extend(texts)
        table = {"liver": [3.0, 0.0], "leber": [1.0, 1.0], "spleen": [0.0, -2.0], "": [0.0, 0.0]}
        return np.array([table[text] for text in texts], np.float32)

    embedder = VectorEmbedder(encode, "toy")
    table = embedder.similarity([("Liver", 5)], [("leber", 0), ("SPLEEN", 1), ("liver", 5)])
    np.testing.assert_allclose(table, [[np.sqrt(0.5), 0.0, 1.0]], atol=1e-7)
    embedder.similarity([("liver", 5)], [("spleen", 1)])
    assert sorted(asked) == ["leber", "liver", "spleen"]
    assert embedder.similarity([("", 0)], [("liver", 5)]) == 0.0
    assert embedder.similarity([], [("liver", 5)]).shape == (0, 1)


def test_an_encoder_of_the_wrong_shape_is_named():
    embedder = VectorEmbedder(lambda texts: np.zeros(3), "broken")
    with pytest.raises(ValueError, match="broken"):
        embedder.similarity([("a", 0)], [("b", 0)])


def test_loading(monkeypatch):
    assert load_embedder().name == "exact"

    class Model:
        def __init__(self, name, local_files_only):
            assert local_files_only, "nothing is downloaded on the way"
            if name == "absent":
                raise OSError("no such model")

        def encode(self, texts, batch_size, show_progress_bar):
            return np.array([[1.0, float(len(text))] for text in texts])

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Model
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    embedder = load_embedder("some/model")
    assert embedder.name == "some/model"
    assert embedder.similarity([("ab", 0)], [("cd", 0)])[0, 0] == pytest.approx(1.0)
    with pytest.raises(UserError, match="absent"):
        load_embedder("absent")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install .*embed"):
        load_embedder("some/model")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A sentence-embedding model as one lies on disk: a random BERT of 32 dimensions."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "liver", "left", "right", "kidney"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    pieces = [*words, *letters, *(f"##{letter}" for letter in letters)]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder)
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = BertTokenizerFast(vocab=vocab)
    assert tokenizer.tokenize("Liver spleen")[:3] == ["liver", "s", "##p"]
    tokenizer.save_pretrained(folder)
    return folder


def test_a_sentence_embedding_model_from_a_folder(tiny_model, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the embedder went to the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    embedder = load_embedder(str(tiny_model))
    assert embedder.name == str(tiny_model)
    mentions = [("Liver", 5), ("left kidney", 3), ("spleen", 1)]
    table = embedder.similarity(mentions, mentions)
    np.testing.assert_allclose(np.diag(table), 1.0, atol=1e-6)
    np.testing.assert_allclose(table, table.T, atol=1e-6)
    others = table[~np.eye(3, dtype=bool)]
    assert (others < 0.9999).all() and (np.abs(others) <= 1).all()
    # Case plays no part, the class neither: a model compares texts.
    assert embedder.similarity([("LIVER", 5)], [("liver", 7)])[0, 0] == pytest.approx(1.0)
    # A vector does not depend on its company.
    alone = load_embedder(str(tiny_model)).similarity(mentions[:1], mentions[1:2])
    assert alone[0, 0] == table[0, 1]


def test_figures_name_the_model_and_use_it(tiny_model):
    from rg_jax.evaluation.results import make_result
    from rg_jax.evaluation.score import score_results
    from rg_jax.grounding.format import OURS

    embedder = load_embedder(str(tiny_model))
    samples = [made_up.detect_sample(k, "en")[0] for k in range(4)]
    # Every mention is given the wrong words and class, at the right place.
    results = [
        make_result(s, made_up.with_other_words(s, "kidney", 3), OURS, embedder) for s in samples
    ]
    metrics = score_results(results, data="d", split="val", embedder=embedder, resamples=20)
    assert metrics["set"]["embedder"] == str(tiny_model)
    exact = [make_result(s, made_up.with_other_words(s, "kidney", 3), OURS) for s in samples]
    below = score_results(exact, data="d", split="val", resamples=20)["g_iou"]["mean"]
    assert below < metrics["g_iou"]["mean"] < 1


def test_a_model_that_is_not_here_is_not_downloaded(monkeypatch):

    def no_network(*_, **__):
        raise AssertionError("the embedder went to the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    with pytest.raises(UserError, match="hf download nobody/no-such-model"):
        load_embedder("nobody/no-such-model")
