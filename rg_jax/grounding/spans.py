"""Marked text: entities written into text and read back.

    box     The <p bbox=<loc0098><loc0018><loc0379><loc0258> id=<seg005>>liver</p> is large.
    mask    The <seg>liver</seg> is large.
    joint   The <p bbox=… id=<seg005>><seg>liver</seg></p> is large.

Writing is strict: what cannot be read back raises. Reading is tolerant, as it reads what a model
generates: a mark that is broken in any way is reported, its text is kept, it yields no entity, and
nothing is ever swallowed. A box whose minimum lies beyond its maximum is broken too. A box with
equal bins is not: that is how a structure thinner than one bin is written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from rg_jax.grounding.anatomy import NUM_CLASSES
from rg_jax.grounding.boxes import Box, from_bins, to_bins
from rg_jax.grounding.format import BOX_CLOSE, BOX_OPEN, MASK_CLOSE, MASK_OPEN, GroundingFormat
from rg_jax.grounding.published import strip_published

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Entity:
    """A mention with class and place.

    `mention` is the text between `start` and `end` (characters of the plain text). `class_id` 0
    means: no class of the schema. `box` is normalised, x first. `mask`: it has a mask.
    """

    mention: str
    start: int
    end: int
    class_id: int = 0
    box: Box | None = None
    mask: bool = False


class Malformed(NamedTuple):
    """A mark that could not be read: what is wrong, where in the marked text, and the mark.

    Kinds: incomplete (an opening mark without its four bins and its end), bin_range, inverted,
    no_id, unknown_class, empty (no mention inside), unclosed (an opening mark without its closing
    one, or with another mark between), stray (a closing mark or a loose piece), not_in_format
    (a mark for which the format has no tokens).
    """

    kind: str
    start: int
    snippet: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a marked text holds.

    `mask_indices` runs beside `entities`: the entity's mask belongs to the k-th `</seg>` of the
    marked text, -1 if it has none. Closing tokens of malformed marks are counted too, since the
    mask decoder makes a mask for each of them.
    """

    text: str
    entities: tuple[Entity, ...]
    malformed: tuple[Malformed, ...]
    mask_indices: tuple[int, ...] = ()


# Every piece that counts as (part of) a mark, the longest form first. The first alternative takes
# whole and broken opening marks alike; the last two are the loose remains of such a mark.
_PIECE = re.compile(
    r"(?P<box_open><p bbox=(?:<loc\d{4}>)*(?: ?id=(?:<seg\d{3}>)?)?>?)"
    r"|(?P<box_close></p>)"
    r"|(?P<mask_open><seg>)"
    r"|(?P<mask_close></seg>)"
    r"|(?P<loose> ?id=<seg\d{3}>>?|<loc\d{4}>|<seg\d{3}>)",
    re.ASCII,
)
_WHOLE_OPEN = re.compile(r"<p bbox=((?:<loc\d{4}>){4})(?: id=<seg(\d{3})>)?>", re.ASCII)
_LOC = re.compile(r"<loc(\d{4})>", re.ASCII)


class _Piece(NamedTuple):
    kind: str
    start: int  # in the marked text
    snippet: str
    at: int  # in the plain text: number of characters before this piece
    mask_index: int  # which </seg> of the text this is, -1 for every other piece


def _split(marked: str) -> tuple[str, list[_Piece]]:
    texts, pieces, position, length, masks = [], [], 0, 0, 0
    for match in _PIECE.finditer(marked):
        texts.append(marked[position : match.start()])
        length += len(texts[-1])
        position = match.end()
        kind = str(match.lastgroup)
        index = -1
        if kind == "mask_close":
            index, masks = masks, masks + 1
        pieces.append(_Piece(kind, match.start(), match.group(), length, index))
    texts.append(marked[position:])
    return "".join(texts), pieces


def _read_open(piece: _Piece, fmt: GroundingFormat) -> tuple[int, Box] | str:
    """Class id and box of an opening box mark, or the kind of its defect."""
    match = _WHOLE_OPEN.fullmatch(piece.snippet)
    if match is None:
        return "incomplete"
    written = tuple(int(number) for number in _LOC.findall(match.group(1)))
    if max(written) >= fmt.bins:
        return "bin_range"
    if fmt.box_order == "yxyx":
        written = (written[1], written[0], written[3], written[2])
    if written[0] > written[2] or written[1] > written[3]:
        return "inverted"
    if match.group(2) is None:
        return "no_id" if fmt.id_required else (0, from_bins(written, fmt.bins))
    class_id = int(match.group(2))
    if not 1 <= class_id <= NUM_CLASSES:
        return "unknown_class"
    return class_id, from_bins(written, fmt.bins)


# An entity is one of these runs of marks; "adjacent" pairs have no text between them.
_FORMS = (
    ("box_open", "mask_open", "mask_close", "box_close"),
    ("box_open", "box_close"),
    ("mask_open", "mask_close"),
)


def _form_at(pieces: list[_Piece], i: int) -> tuple[str, ...]:
    for form in _FORMS:
        run = pieces[i : i + len(form)]
        if tuple(piece.kind for piece in run) != form:
            continue
        joint = len(form) == 4
        if joint and (run[0].at != run[1].at or run[2].at != run[3].at):
            continue
        return form
    return ()


def parse(marked: str, fmt: GroundingFormat) -> Parsed:
    """Read marked text, well-formed or not. Never raises on any string, never loses text."""
    text, pieces = _split(marked)
    entities: list[Entity] = []
    mask_indices: list[int] = []
    malformed: list[Malformed] = []
    i = 0
    while i < len(pieces):
        piece = pieces[i]
        form = _form_at(pieces, i)
        if not form:
            opens = piece.kind in ("box_open", "mask_open")
            kind = "unclosed" if opens else "stray"
            if piece.kind == "box_open" and not _WHOLE_OPEN.fullmatch(piece.snippet):
                kind = "incomplete"
            malformed.append(Malformed(kind, piece.start, piece.snippet))
            i += 1
            continue
        run = pieces[i : i + len(form)]
        i += len(form)
        has_box, has_mask = "box_open" in form, "mask_open" in form
        start, end = piece.at, run[-1].at
        mention = text[start:end]
        defect, class_id, box = "", 0, None
        if (has_box and not fmt.has_boxes) or (has_mask and not fmt.has_masks):
            defect = "not_in_format"
        elif has_box:
            read = _read_open(piece, fmt)
            if isinstance(read, str):
                defect = read
            else:
                class_id, box = read
        if not defect and not mention.strip():
            defect = "empty"
        if defect:
            malformed.append(Malformed(defect, piece.start, piece.snippet))
            continue
        entities.append(Entity(mention, start, end, class_id, box, has_mask))
        mask_indices.append(max(p.mask_index for p in run))
    return Parsed(text, tuple(entities), tuple(malformed), tuple(mask_indices))


def has_marks(text: str) -> bool:
    """Whether the reader would take any part of `text` for a mark or a piece of one."""
    return _PIECE.search(text) is not None


def strip_marks(marked: str, fmt: GroundingFormat, style: str = "ours") -> str:
    """Marked text without its marks.

    "ours" leaves exactly the text between the marks, whatever the string. "published" removes
    what the published evaluation removes, text behind malformed marks included; it exists for
    comparisons with published figures only.
    """
    if style == "ours":
        return _split(marked)[0]
    if style == "published":
        return strip_published(marked, boxes=fmt.has_boxes, masks=fmt.has_masks)
    raise ValueError(f"strip_marks: style {style!r} is not 'ours' or 'published'")


def _opening(entity: Entity, fmt: GroundingFormat, check_boxes: bool) -> str:
    box = entity.box
    assert box is not None
    if check_boxes and not (box[0] <= box[2] and box[1] <= box[3]):
        raise ValueError(f"entity {entity.mention!r}: box {box} is swapped")
    x_min, y_min, x_max, y_max = to_bins(box, fmt.bins)
    numbers = (x_min, y_min, x_max, y_max)
    if fmt.box_order == "yxyx":
        numbers = (y_min, x_min, y_max, x_max)
    locs = "".join(f"<loc{number:04d}>" for number in numbers)
    class_part = f" id=<seg{entity.class_id:03d}>" if entity.class_id else ""
    return f"{BOX_OPEN}{locs}{class_part}>"


def write(
    text: str,
    entities: Iterable[Entity],
    fmt: GroundingFormat,
    boxes: bool = True,
    masks: bool = False,
    *,
    check_boxes: bool = True,
) -> str:
    """Write entities into `text` as marks; the inverse of `parse`.

    `boxes` / `masks` choose what is written: box marks, mask marks or, with both, the joint form.
    With both, an entity that has only one of the two is written with that one. Boxes are binned
    from their normalised coordinates and clipped to the image; `check_boxes=False` lets swapped
    boxes through (the published data holds such), which the reader will report as malformed.
    Raises ValueError for spans that overlap, are empty, lie outside the text or do not hold the
    mention, for an entity with nothing to write, for a class outside the schema, for class 0
    where the format requires ids, for marks the format has no tokens for, and for text that
    already holds marks.
    """
    if boxes and not fmt.has_boxes or masks and not fmt.has_masks:
        raise ValueError(
            f"this grounding format has no tokens for {'boxes' if not fmt.has_boxes else 'masks'}"
        )
    if has_marks(text):
        raise ValueError(f"text already holds grounding marks: {text!r}")
    parts, position = [], 0
    for entity in sorted(entities, key=lambda e: (e.start, e.end)):
        name = f"entity {entity.mention!r} [{entity.start}, {entity.end})"
        if not 0 <= entity.start < entity.end <= len(text):
            raise ValueError(f"{name} lies outside a text of {len(text)} characters or is empty")
        if text[entity.start : entity.end] != entity.mention or not entity.mention.strip():
            raise ValueError(f"{name} does not stand there: {text[entity.start : entity.end]!r}")
        if entity.start < position:
            raise ValueError(f"{name} overlaps the entity before it")
        if not 0 <= entity.class_id <= NUM_CLASSES:
            raise ValueError(f"{name}: class id {entity.class_id} is not in 0..{NUM_CLASSES}")
        with_box = boxes and entity.box is not None
        with_mask = masks and entity.mask
        if not with_box and not with_mask:
            raise ValueError(f"{name} has no {'box' if boxes else 'mask'} to write")
        if with_box and fmt.id_required and not entity.class_id:
            raise ValueError(f"{name} has no class, but this grounding format requires an id")
        mark = f"{MASK_OPEN}{entity.mention}{MASK_CLOSE}" if with_mask else entity.mention
        if with_box:
            mark = f"{_opening(entity, fmt, check_boxes)}{mark}{BOX_CLOSE}"
        parts += [text[position : entity.start], mark]
        position = entity.end
    return "".join([*parts, text[position:]])


def find_mentions(
    text: str,
    mentions: Sequence[tuple[str, Key]],
    has_place: Callable[[Key], bool] | Collection[Key],
    ignore_case: bool = False,
) -> list[tuple[int, int, Key]]:
    """Where the mentions stand in `text`: (start, end, key), in text order, none overlapping.

    Mentions whose key has no place are left out first. Then one pass over the text,
    leftmost-longest, on word boundaries ((?<!\\w)mention(?!\\w), which also finds mentions that
    begin or end with a bracket); every occurrence counts. A mention listed several times gets the
    key that is listed first among those with a place.
    """
    placed = has_place if callable(has_place) else has_place.__contains__
    keys: dict[str, Key] = {}
    for mention, key in mentions:
        if mention.strip() and mention not in keys and placed(key):
            keys[mention] = key
    if not keys:
        return []
    # Longest first makes the alternation leftmost-longest; sorted() is stable, so that among
    # equally long ones (which differ in case at most) the first listed wins.
    ordered = sorted(keys, key=len, reverse=True)
    alternatives = "|".join(f"({re.escape(mention)})" for mention in ordered)
    pattern = re.compile(
        rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE if ignore_case else re.NOFLAG
    )
    return [
        (match.start(), match.end(), keys[ordered[match.lastindex - 1]])
        for match in pattern.finditer(text)
        if match.lastindex
    ]


def tag(
    text: str,
    mentions: Sequence[tuple[str, int]],
    has_place: Callable[[int], bool] | Collection[int],
    ignore_case: bool = False,
) -> list[Entity]:
    """`find_mentions` for mentions with class ids: entities without a place yet.

    The entity's mention is the text as it stands, which matters with `ignore_case`.
    """
    return [
        Entity(text[start:end], start, end, class_id)
        for start, end, class_id in find_mentions(text, mentions, has_place, ignore_case)
    ]
