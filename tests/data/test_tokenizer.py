"""The tokenizer: exact both ways, same bytes every time, wrong files refused."""

import pickle
import random

import pytest
import sentencepiece

from rg_jax.data import tokenizer as tk
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION

TEXTS = [
    "The liver is enlarged.",
    "Die Leber ist vergrößert, 12 mm.",
    "Caption this image and detect keywords:",
    "Beschreibe dieses Bild:\n\nKlinische angaben: Fieber.",
]
PIECES = [
    *OURS.extra_tokens,
    *("<loc0001>", "<seg004>", "<loc1024>", "<loc12>", "<seg0>", "<loc00012>"),
    *("<image>", "<eos>", "<bos>", "<pad>", "<unk>", "<0x0A>", "</s>"),
    *(" ", "  ", "\n", "\n\n", "\n\n\n", "\r\n", "\t", "\u2581", "\u00a0", "\x00", "\u200b"),
    *("ä", "ß", "e\u0301", "🙂", "漢", "ﬁ", "Leber", "The"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tk.train_tokenizer(TEXTS, path, 2000)
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return tk.Tokenizer.load(path, OURS.extra_tokens)


def test_special_ids_and_rows(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.image_id == tokenizer.base_size
    assert tokenizer.extra_ids == tuple(range(tokenizer.image_id + 1, tokenizer.vocab_size))
    assert tokenizer.vocab_size == tokenizer.base_size + 1 + 5
    assert len(tokenizer.loc_ids) == 1024 and len(tokenizer.seg_ids) == 128
    for token, token_id in zip(OURS.extra_tokens, tokenizer.extra_ids, strict=True):
        assert tokenizer.encode(token) == [token_id]
    assert tokenizer.encode("<loc0007>") == [tokenizer.loc_ids[7]]
    assert tokenizer.encode("<seg121>") == [tokenizer.seg_ids[121]]


def test_a_mark_is_its_tokens(tokenizer):
    text = "<p bbox=<loc0001><loc0002><loc0003><loc0511> id=<seg005>><seg>liver</seg></p>"
    pieces = [tokenizer.piece(i) for i in tokenizer.encode(text)]
    assert pieces[:5] == ["<p bbox=", "<loc0001>", "<loc0002>", "<loc0003>", "<loc0511>"]
    assert pieces[5:8] == ["▁", "id=", "<seg005>"]
    assert pieces[8:10] == [">", "<seg>"] and pieces[-2:] == ["</seg>", "</p>"]


def test_the_image_token_is_never_written(tokenizer):
    assert tokenizer.image_id not in tokenizer.encode("<image> and <image>")
    assert not {0, 1, 2, 3} & set(tokenizer.encode("<pad><eos><bos><unk></s>"))


def test_decode_inverts_encode(tokenizer):
    rng = random.Random(0)

    def part():
        if rng.random() < 0.7:
            return rng.choice(PIECES)
        code = rng.randrange(0x110000)
        return "" if 0xD800 <= code < 0xE000 else chr(code)

    for _ in range(3000):
        text = "".join(part() for _ in range(rng.randrange(10)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_skips_padding_and_survives_anything(tokenizer):
    ids = [2, *tokenizer.encode("Leber"), 1, 0, 0, 3, 10**6, -1]
    assert tokenizer.decode(ids) == "Leber"
    assert tokenizer.decode(tokenizer.encode("ä🙂漢")[:-1]).startswith("ä🙂")
    assert tokenizer.decode(range(tokenizer.vocab_size))


def test_line_breaks_are_pieces(tokenizer):
    assert len(tokenizer.encode("\n")) == 1 and len(tokenizer.encode("\n\n")) == 1


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")


def test_training_gives_the_same_bytes(path, tmp_path):
    tk.train_tokenizer(list(reversed(TEXTS)) * 2, tmp_path / "again.model", 2000)
    assert (tmp_path / "again.model").read_bytes() == path.read_bytes()
    assert str(tmp_path).encode() not in path.read_bytes()


def test_training_parameters(tmp_path):
    tk.train_tokenizer(TEXTS, tmp_path / "t.model", 1000, num_loc=64, num_seg=122)
    small = tk.Tokenizer.load(tmp_path / "t.model", PUBLISHED_DETECTION.extra_tokens)
    assert len(small.loc_ids) == 64 and len(small.seg_ids) == 122
    assert small.base_size <= 1000 and len(small.extra_ids) == 3
    assert small.decode(small.encode("<loc0064>x</seg>")) == "<loc0064>x</seg>"
    with pytest.raises(UserError, match="no room"):
        tk.train_tokenizer(TEXTS, tmp_path / "t.model", 1300)
    with pytest.raises(UserError, match="no text"):
        tk.train_tokenizer(["", " \n"], tmp_path / "t.model", 2000)


def test_a_copy_travels(tokenizer, path, tmp_path):
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = "The <p bbox= \u2581 liver"
    assert copy.encode(text) == tokenizer.encode(text) and copy.sha256 == tokenizer.sha256
    tokenizer.save(tmp_path / "copy.model")
    assert (tmp_path / "copy.model").read_bytes() == path.read_bytes()


def spm(tmp_path, **options):
    """A SentencePiece file of another make than ours."""
    defaults = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(tmp_path / "other"),
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, **options},
    )
    return tmp_path / "other.model"


def test_wrong_files_are_refused(tmp_path, path):
    with pytest.raises(UserError, match=r"nowhere\.model cannot be read"):
        tk.Tokenizer.load(tmp_path / "nowhere.model", ())
    (tmp_path / "junk.model").write_bytes(b"junk, no model")
    with pytest.raises(UserError, match=r"junk\.model is not a SentencePiece model"):
        tk.Tokenizer.load(tmp_path / "junk.model", ())
    (tmp_path / "cut.model").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"cut\.model"):
        tk.Tokenizer.load(tmp_path / "cut.model", ())
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.model"):
        tk.Tokenizer.load(tmp_path / "empty.model", ())
    with pytest.raises(UserError, match="sha256"):
        tk.Tokenizer.load(path, (), expected_sha256="0" * 64)
    with pytest.raises(UserError, match="PAD, EOS, BOS at .*not"):
        tk.Tokenizer.load(spm(tmp_path, pad_id=3, unk_id=0), ())
    with pytest.raises(UserError, match="no <loc0000>"):
        tk.Tokenizer.load(spm(tmp_path), ())
    with pytest.raises(UserError, match="no byte pieces"):
        marks = [tk.loc_piece(0), tk.seg_piece(0)]
        tk.Tokenizer.load(spm(tmp_path, byte_fallback=False, user_defined_symbols=marks), ())
    with pytest.raises(UserError, match="splits <loc0000>"):
        marks = [tk.loc_piece(0), tk.seg_piece(0)]
        tk.Tokenizer.load(spm(tmp_path, control_symbols=marks), ())
    with pytest.raises(UserError, match="repetition"):
        tk.Tokenizer.load(path, ("<seg>", "<seg>"))


def test_plain_gemma_gets_its_marks_appended(tmp_path, monkeypatch):
    exact = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
    file = spm(tmp_path, normalization_rule_name="identity", **exact)
    pieces = sentencepiece.SentencePieceProcessor(str(file)).get_piece_size()
    monkeypatch.setattr(tk, "GEMMA_PIECES", pieces)
    tokenizer = tk.Tokenizer.load(file, PUBLISHED_SEGMENTATION.extra_tokens)
    assert tokenizer.loc_ids == tuple(range(pieces, pieces + 1024))
    assert tokenizer.seg_ids == tuple(range(pieces + 1024, pieces + 1152))
    assert tokenizer.extra_ids == (pieces + 1153, pieces + 1154)
    text = "The <seg>liver</seg> <loc0003><seg003>."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.loc_ids[3] in tokenizer.encode(text)


def test_a_file_that_changes_blanks_is_reported(tmp_path, caplog):
    marks = [tk.loc_piece(0), tk.seg_piece(0)]
    file = spm(tmp_path, user_defined_symbols=marks, add_dummy_prefix=False)
    tk.Tokenizer.load(file, ())
    assert "changes blanks" in caplog.text
