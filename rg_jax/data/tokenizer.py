"""Text ↔ token ids: a SentencePiece file and the model's extra tokens behind it.

Rows of the embedding table, for a file of n pieces (the loc and seg pieces are among them; a plain
Gemma file, which has none, gets them appended):

    0 … n-1      the pieces; PAD 0, EOS 1, BOS 2
    n            <image>: reserved, so that rows agree with published checkpoints. Never written:
                 the literal text "<image>" is ordinary text
    n+1 …        the extra tokens of the grounding format, in its order

Encoding splits at the extra tokens first; each part between them is one SentencePiece call.
Nothing is added in front or behind: BOS and EOS are set by id where rows are laid out.
"""

import hashlib
import io
import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsInt

import sentencepiece

from rg_jax.config import write_aside
from rg_jax.errors import UserError

_log = logging.getLogger(__name__)

PAD_ID, EOS_ID, BOS_ID, UNK_ID = 0, 1, 2, 3
NUM_LOC, NUM_SEG = 1024, 128
IMAGE_TOKEN = "<image>"

PALIGEMMA_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
GEMMA_SHA256 = "61a7b147390c64585d6c3543dd6fc636906c9af3865a5548f27f31aee1d4c8e2"
GEMMA_PIECES = 256000

# SentencePiece writes a blank as this character; a text that holds it would read back as a blank.
_BLANK = "\u2581"


def loc_piece(index: int) -> str:
    """The piece of coordinate bin `index`: <loc0000>, <loc0001>, …"""
    return f"<loc{index:04d}>"


def seg_piece(index: int) -> str:
    """The piece of class or codebook number `index`: <seg000>, <seg001>, …"""
    return f"<seg{index:03d}>"


class Tokenizer:
    """A SentencePiece model plus extra tokens. Make one with `Tokenizer.load`.

    `vocab_size` counts all ids: pieces, `<image>`, extra tokens. `loc_ids` and `seg_ids` list the
    ids of the loc and seg pieces, `extra_ids` those of the extra tokens, in order. `sha256` is that
    of the file's bytes, `model_bytes` the bytes themselves (to store a copy with a run).
    """

    pad_id, eos_id, bos_id = PAD_ID, EOS_ID, BOS_ID

    def __init__(self, model_bytes: bytes, extra_tokens: Sequence[str], name: str = "tokenizer"):
        self.model_bytes, self.extra_tokens = model_bytes, tuple(extra_tokens)
        self.sha256 = hashlib.sha256(model_bytes).hexdigest()
        self._model = _processor(model_bytes, name)
        pieces = self._model.get_piece_size()
        _check_special_ids(self._model, name)

        appended = _missing_marks(self._model, pieces, name)
        self.base_size = pieces + len(appended)
        self.image_id = self.base_size
        self.extra_ids = tuple(self.image_id + 1 + i for i in range(len(self.extra_tokens)))
        self.vocab_size = self.image_id + 1 + len(self.extra_tokens)

        added = {text: pieces + i for i, text in enumerate(appended)}
        added.update(zip(self.extra_tokens, self.extra_ids, strict=True))
        if len(added) != len(appended) + len(self.extra_tokens) or "" in added:
            raise UserError(f"{name}: the extra tokens {list(self.extra_tokens)} hold a repetition")
        self._added = added
        # The blank character is split off too: it has to be spelled in bytes to survive.
        parts = sorted([*added, _BLANK], key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, parts)) + ")")
        self._bytes = _bytes_of_ids(self._model)
        self._bytes += [text.encode() for text in appended] + [IMAGE_TOKEN.encode()]
        self._bytes += [text.encode() for text in self.extra_tokens]
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _BLANK.encode()]
        if any(i == self._model.unk_id() for i in byte_ids):
            raise UserError(f"{name} has no byte pieces; it could not write every text")
        self._added[_BLANK] = -1
        self._blank_ids = byte_ids

        self.loc_ids = self._mark_ids(loc_piece, added)
        self.seg_ids = self._mark_ids(seg_piece, added)
        _check_marks(self, name)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        extra_tokens: Sequence[str],
        expected_sha256: str | None = None,
    ) -> "Tokenizer":
        """Reads a SentencePiece file and checks what was loaded.

        Raises UserError naming the file: not there, not a SentencePiece model, another hash than
        expected, PAD/EOS/BOS not 0/1/2, or `<loc0000>` not one piece.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(f"tokenizer file {path} cannot be read: {error.strerror}") from None
        if expected_sha256 is not None:
            found = hashlib.sha256(data).hexdigest()
            if found != expected_sha256:
                raise UserError(
                    f"tokenizer file {path} has sha256 {found}, not {expected_sha256}: this is"
                    " not the file that the model was made with"
                )
        return cls(data, extra_tokens, f"tokenizer file {path}")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; `decode` gives exactly this text back.

        Raises UserError for a text with half a surrogate pair, which no UTF-8 file can hold.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"text {text!r} is not valid Unicode at {error.start}") from None
        ids: list[int] = []
        for part in self._split.split(text):
            if not part:
                continue
            added = self._added.get(part)
            if added is None:
                ids += self._model.encode(part)
            else:
                ids += self._blank_ids if added < 0 else (added,)
        return ids

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of token ids; PAD, EOS, BOS and UNK are nothing, rows beyond the vocabulary too.

        Byte pieces that do not join to a character, as a model may write them, become U+FFFD.
        """
        table, size = self._bytes, self.vocab_size
        return b"".join(table[i] for i in map(int, ids) if 0 <= i < size).decode(errors="replace")

    def piece(self, token_id: SupportsInt) -> str:
        """One token as it is shown to people: `▁liver`, `<loc0012>`, `<0x0A>`, `<p bbox=`."""
        token_id = int(token_id)
        if token_id < self._model.get_piece_size():
            return self._model.id_to_piece(token_id)
        return self._bytes[token_id].decode() if token_id < self.vocab_size else "<unused>"

    def save(self, path: str | os.PathLike) -> None:
        """Stores the file's bytes, whole or not at all."""
        write_aside(path, self.model_bytes)

    def __getstate__(self):
        return {"model_bytes": self.model_bytes, "extra_tokens": self.extra_tokens}

    def __setstate__(self, state):
        self.__init__(**state)

    def _mark_ids(self, piece, added: dict[str, int]) -> tuple[int, ...]:
        ids: list[int] = []
        while True:
            text = piece(len(ids))
            found = added.get(text, self._model.piece_to_id(text))
            if found == self._model.unk_id():
                return tuple(ids)
            ids.append(found)


def _processor(data: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, TypeError):
        raise UserError(f"{name} is not a SentencePiece model") from None


def _check_special_ids(model: sentencepiece.SentencePieceProcessor, name: str) -> None:
    found = (model.pad_id(), model.eos_id(), model.bos_id())
    if found != (PAD_ID, EOS_ID, BOS_ID):
        raise UserError(
            f"{name} has PAD, EOS, BOS at {found}, not {(PAD_ID, EOS_ID, BOS_ID)}: it is not a"
            " tokenizer of this family of models"
        )


def _missing_marks(model, pieces: int, name: str) -> list[str]:
    """The loc and seg pieces to append: all for a plain Gemma file, none where they are inside."""
    if model.piece_to_id(loc_piece(0)) != model.unk_id():
        return []
    if pieces != GEMMA_PIECES:
        raise UserError(
            f"{name} has {pieces} pieces and no {loc_piece(0)}: use paligemma_tokenizer.model, a"
            f" plain Gemma tokenizer ({GEMMA_PIECES} pieces) or train one with train_tokenizer"
        )
    return [loc_piece(i) for i in range(NUM_LOC)] + [seg_piece(i) for i in range(NUM_SEG)]


def _check_marks(tokenizer: Tokenizer, name: str) -> None:
    """Loc and seg pieces have to stay single tokens, in a row, at the known place in the known."""
    for ids, piece in ((tokenizer.loc_ids, loc_piece), (tokenizer.seg_ids, seg_piece)):
        if not ids:
            raise UserError(f"{name} has no {piece(0)}; boxes and classes cannot be written")
        if ids != tuple(range(ids[0], ids[0] + len(ids))):
            raise UserError(f"{name} does not hold its {piece(0)} … pieces in a row")
        if tokenizer.encode(piece(0)) != [ids[0]]:
            raise UserError(f"{name} splits {piece(0)}: it is no user-defined piece of the file")
    probe = "  Two  blanks,\n\n ä "
    if tokenizer.decode(tokenizer.encode(probe)) != probe:
        _log.warning("%s changes blanks: text does not come back as it was", name)
    real = tokenizer.base_size == GEMMA_PIECES + NUM_LOC + NUM_SEG
    if real and tokenizer.loc_ids[0] != GEMMA_PIECES:
        raise UserError(f"{name} has {loc_piece(0)} at {tokenizer.loc_ids[0]}, not {GEMMA_PIECES}")


def _bytes_of_ids(model) -> list[bytes]:
    """What every id stands for, as UTF-8: byte pieces are one byte, control pieces nothing."""
    table = []
    for i in range(model.get_piece_size()):
        if model.is_byte(i):
            table.append(bytes([int(model.id_to_piece(i)[3:5], 16)]))
        elif model.is_control(i) or model.is_unknown(i):
            table.append(b"")
        else:
            table.append(model.id_to_piece(i).replace(_BLANK, " ").encode())
    return table


# Spelled out in the small vocabulary even if the texts lack them, so that any English or German
# question costs about a token per character and not one per byte.
_ALWAYS = "".join(map(chr, range(33, 127))) + "äöüÄÖÜß°µ²³±–"


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike,
    vocab_size: int = 4096,
    num_loc: int = NUM_LOC,
    num_seg: int = NUM_SEG,
    seed: int = 0,
) -> None:
    """Trains a small SentencePiece model on `texts` and stores it, whole or not at all.

    For demos and tests, which have no gated tokenizer. `vocab_size` bounds the number of pieces,
    the special, byte, loc and seg ones included; few texts give fewer. Same texts, same bytes.
    What is written reads back exactly: bytes for what the pieces lack, no normalisation, no blank
    added or removed. A line break is a piece and so are two, as in the big tokenizer.
    Raises UserError where `vocab_size` leaves no room for text or there is no text.
    """
    marks = [loc_piece(i) for i in range(num_loc)] + [seg_piece(i) for i in range(num_seg)]
    fixed = 4 + 256 + 2 + len(marks)
    if vocab_size < fixed + len(_ALWAYS) + 32:
        raise UserError(
            f"vocab_size {vocab_size} leaves no room for text: {fixed} pieces are fixed; give"
            f" at least {fixed + len(_ALWAYS) + 32}"
        )
    # What repeats counts as often as it does: prompts become few pieces. Sorting keeps the result
    # independent of the order on disk.
    lines = sorted(line for text in texts for line in text.split("\n") if line.strip())
    if not lines:
        raise UserError("train_tokenizer got no text")
    out = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    sentencepiece.SentencePieceTrainer.train(
        # An iterator and a writer: a file name would end up inside the model.
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars=_ALWAYS,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\n\n", *marks],
        pad_id=PAD_ID,
        eos_id=EOS_ID,
        bos_id=BOS_ID,
        unk_id=UNK_ID,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        max_sentence_length=1 << 20,
        num_threads=1,  # several threads would sum in another order each time
        minloglevel=2,
    )
    write_aside(path, out.getvalue())
