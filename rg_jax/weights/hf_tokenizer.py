"""A model's tokenizer in Hugging Face form: written from SentencePiece, and checked against it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rg_jax.config import write_aside
from rg_jax.data.tokenizer import (
    GEMMA_PIECES,
    GEMMA_SHA256,
    IMAGE_TOKEN,
    NUM_LOC,
    NUM_SEG,
    PALIGEMMA_SHA256,
    Tokenizer,
    loc_piece,
)
from rg_jax.errors import UserError
from rg_jax.grounding.format import KNOWN_EXTRA_TOKENS
from rg_jax.weights.hf_config import read_json

TOKENIZER_MODEL = "tokenizer.model"
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_BPE = 2
_BLANK = "\u2581"
# Pieces that the processor of the library knows as tokens of its own.
_MARK = re.compile(r"<loc\d{4}>|<seg\d{3}>")


# ---------------------------------------------------------------- out


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """`tokenizer.model`, `tokenizer.json` and their configs, as `AutoTokenizer` loads them.

    Raises UserError for a SentencePiece file that the library's BPE cannot stand for.
    """
    config = {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "pad_token": tokenizer.piece(tokenizer.pad_id),
        "unk_token": tokenizer.piece(3),
        "mask_token": None,
        "additional_special_tokens": [IMAGE_TOKEN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
        "added_tokens_decoder": {
            str(token.pop("id")): token for token in _added_tokens(tokenizer, _model(tokenizer))
        },
    }
    special = {name: config[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special["additional_special_tokens"] = [IMAGE_TOKEN]
    write_aside(folder / TOKENIZER_MODEL, tokenizer.model_bytes)
    write_aside(folder / "tokenizer.json", _json(tokenizer_json(tokenizer)))
    write_aside(folder / "tokenizer_config.json", _json(config))
    write_aside(folder / "special_tokens_map.json", _json(special))


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the `tokenizers` library reads: byte-pair merges that do what SentencePiece does.

    SentencePiece joins the pair whose whole has the best score, so every way to split a piece into
    two others is a merge, in the order of the scores. Pieces that SentencePiece never splits or
    joins, and the tokens behind the file's, are added tokens: those are found first there too.
    """
    model = _model(tokenizer)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    for i in range(len(model.pieces), tokenizer.vocab_size):
        vocab[tokenizer.piece(i)] = i
    normal = {p.piece: p.score for p in model.pieces if p.type == _NORMAL}
    ranked = [
        (-score, vocab[piece], piece[:at], piece[at:])
        for piece, score in normal.items()
        for at in range(1, len(piece))
        if piece[:at] in normal and piece[at:] in normal
    ]
    bos = tokenizer.piece(tokenizer.bos_id)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(tokenizer, model),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokenizer.piece(3),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for _, _, left, right in sorted(ranked)],
        },
    }


def _model(tokenizer: Tokenizer) -> Any:
    """The SentencePiece file taken apart, a ModelProto. Raises UserError for one of another kind,
    or where the protobuf that is installed is too old for SentencePiece's messages."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # protobuf's own VersionError, of no public kind
        raise UserError(
            f"tokenizer.model cannot be taken apart ({error}): update protobuf"
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.model_bytes)
    rules = model.normalizer_spec
    if model.trainer_spec.model_type != _BPE:
        raise UserError("this tokenizer.model is no byte-pair model: it cannot be exported")
    if rules.precompiled_charsmap or rules.add_dummy_prefix or rules.remove_extra_whitespaces:
        raise UserError("this tokenizer.model normalises its texts: it cannot be exported")
    return model


def _added_tokens(tokenizer: Tokenizer, model: Any) -> list[dict[str, Any]]:
    def token(i: int, text: str, special: bool) -> dict[str, Any]:
        return {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            # Runs of blanks are met where blanks have already become the sign for them.
            "normalized": _BLANK in text,
            "special": special,
        }

    added = [
        token(i, piece.piece, piece.type != _USER_DEFINED)
        for i, piece in enumerate(model.pieces)
        if piece.type in (_CONTROL, _USER_DEFINED) or i == 3
    ]
    for i in range(len(model.pieces), tokenizer.vocab_size):
        added.append(token(i, tokenizer.piece(i), i == tokenizer.image_id))
    return added


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


# ---------------------------------------------------------------- in


def read_tokens(folder: Path) -> dict[str, int] | None:
    """Token → id by the folder's own tokenizer files, whichever it has; None without any.

    Raises UserError for a file that is damaged.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        content = read_json(path)
        try:
            tokens = dict(content["model"]["vocab"])
            tokens |= {t["content"]: t["id"] for t in content.get("added_tokens", [])}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a tokenizer's file ({error!r})") from error
        return tokens
    tokens = {}
    if (folder / "added_tokens.json").is_file():
        tokens |= read_json(folder / "added_tokens.json")
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            added = read_json(path).get("added_tokens_decoder", {})
            tokens |= {token["content"]: int(i) for i, token in added.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path} is not a tokenizer's file ({error!r})") from error
    return tokens or None


def tokens_of(tokenizer: Tokenizer) -> dict[str, int]:
    """Token → id of a tokenizer of ours, as `read_tokens` gives it for a folder."""
    return {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}


def extra_tokens_of(path: str, tokens: dict[str, int], image_id: int) -> tuple[str, ...]:
    """The tokens behind `<image>`, in the order of their rows.

    Raises UserError where `<image>` is elsewhere, for a token that nobody here can read, and for
    ids with a gap.
    """
    if tokens.get(IMAGE_TOKEN, image_id) != image_id:
        raise UserError(
            f"{path}: {IMAGE_TOKEN} is {tokens[IMAGE_TOKEN]} in the tokenizer and {image_id} in "
            "config.json: they do not belong together"
        )
    behind = {i: text for text, i in tokens.items() if i > image_id and not _MARK.fullmatch(text)}
    found = tuple(behind[i] for i in sorted(behind))
    unknown = [text for text in found if text not in KNOWN_EXTRA_TOKENS]
    if unknown:
        raise UserError(f"{path}: its tokenizer adds tokens that are not known: {unknown}")
    if sorted(behind) != list(range(image_id + 1, image_id + 1 + len(found))):
        raise UserError(f"{path}: its extra tokens are not in a row: {behind}")
    return found


def check_known(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer of PaliGemma's size that is neither of the two known files.

    Any other size is a small one of our own, of which there is no hash.
    """
    if tokenizer.base_size != GEMMA_PIECES + NUM_LOC + NUM_SEG:
        return
    if tokenizer.sha256 not in (PALIGEMMA_SHA256, GEMMA_SHA256):
        raise UserError(
            f"the tokenizer has sha256 {tokenizer.sha256}, which is neither that of PaliGemma's "
            f"({PALIGEMMA_SHA256}) nor that of Gemma 2's ({GEMMA_SHA256}): fetch it again"
        )


def check_same(path: str, tokens: dict[str, int] | None, tokenizer: Tokenizer) -> None:
    """Raises UserError unless `tokens` (of a folder) and `tokenizer` have the same pieces.

    Every token that both know by its id is compared, bins and classes by their text.
    """
    if tokens is None:
        return
    loc = loc_piece(0)
    if loc in tokens and tokens[loc] != tokenizer.loc_ids[0]:
        raise UserError(
            f"{path} has {loc} at {tokens[loc]}, the run's tokenizer at {tokenizer.loc_ids[0]}: "
            "this is another tokenizer; give the one that lies beside the weights with "
            "--config.tokenizer.path=FILE"
        )
    for text, i in tokens.items():
        if i >= tokenizer.base_size or re.fullmatch(r"<0x[0-9A-F]{2}>|\t", text):
            continue  # added tokens are matched by name; a tab is one of its bytes in some files
        ours = tokenizer.piece(i)
        if ours != text:
            raise UserError(
                f"{path} has {text!r} as token {i}, the run's tokenizer {ours!r}: this is another "
                "tokenizer; give the one that lies beside the weights with "
                "--config.tokenizer.path=FILE"
            )
