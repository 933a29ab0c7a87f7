"""Marked text: golden targets, round trips, garbage."""

import dataclasses
import json

import numpy as np
import pytest

from rg_jax.grounding import boxes, spans
from rg_jax.grounding.cleaning import clean_text
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION
from rg_jax.grounding.format import GroundingFormat as Format
from rg_jax.grounding.spans import Entity, parse, strip_marks, tag, write

BINS = (64, 100, 512, 1000, 1024)
LIVER = "<p bbox=<loc0098><loc0018><loc0379><loc0258> id=<seg005>>"


FORMATS = [
    dataclasses.replace(OURS, bins=bins, box_order=order)
    for bins in BINS
    for order in ("xyxy", "yxyx")
]


def golden_cases(golden, task):
    cases = json.loads((golden / "targets.json").read_text("utf-8"))["cases"]
    assert cases
    found = [case for case in cases if case["task"] == task]
    found = [case for case in found if case.get("suggested_suffix") is not None]
    if not found:
        pytest.skip(f"this set has no {task} case with a suggested target")
    return found


def caption_of(case):
    if case.get("caption") is not None:
        return case["caption"]
    return clean_text(case["caption_raw"], style="published")


def boxes_224(case):
    """Whole pixels of 224, as given or made of the slice's own as the published loader does."""
    if case.get("boxes_224") is not None:
        return case["boxes_224"]
    height, width = case["orig_hw"]
    scale = np.float32(224) / np.array([width, height, width, height], np.float32)
    return (np.array(case["boxes_orig"], np.float32).reshape(-1, 4) * scale).astype(int).tolist()


def test_targets_golden_detection(golden):
    for case in golden_cases(golden, "detection"):
        caption, place = caption_of(case), {}
        for class_id, box in zip(case["labels"], boxes_224(case), strict=True):
            place.setdefault(class_id, boxes.normalise(box, 224, 224))
        found = tag(caption, [(m, i) for m, _, i in case["keywords"]], place)
        entities = [dataclasses.replace(e, box=place[e.class_id]) for e in found]
        marked = write(caption, entities, PUBLISHED_DETECTION, check_boxes=False)
        assert marked == case["suggested_suffix"], case["id"]
        assert strip_marks(marked, PUBLISHED_DETECTION) == caption, case["id"]


def test_targets_golden_segmentation(golden):
    for case in golden_cases(golden, "segmentation"):
        present = case.get("mask16_classes_present")
        if present is None:
            present = sorted(set(np.unique(case["mask16"]).tolist()) - {0})
        caption = caption_of(case)
        found = tag(caption, [(m, i) for m, _, i in case["keywords"]], present)
        entities = [dataclasses.replace(e, mask=True) for e in found]
        marked = write(caption, entities, PUBLISHED_SEGMENTATION, boxes=False, masks=True)
        assert marked == case["suggested_suffix"], case["id"]
        if case.get("suggested_mask_classes") is not None:
            assert [e.class_id for e in entities] == case["suggested_mask_classes"], case["id"]
        parsed = parse(marked, PUBLISHED_SEGMENTATION)
        assert [e.mention for e in parsed.entities] == [e.mention for e in entities]
        assert list(parsed.mask_indices) == list(range(len(entities)))


# --- random texts ---------------------------------------------------------------------------

PLAIN = ["liver", "Übergang", " ", " ", "\n", "<", ">", "/p>", "<p", " id=", "id=", "<5 mm", "b"]
PLAIN += [">3", "seg", "bbox=", "<loc", "loc0001>", "\\1", "1.2", "=", "<seg", "肝"]


def random_text(rng, low=0, high=9):
    while True:
        text = "".join(rng.choice(PLAIN, size=int(rng.integers(low, high))))
        if not spans.has_marks(text):
            return text


def random_entities(rng, text, bins, *, with_box, with_mask, mixed=False):
    """Entities on random cuts of the text, boxes on bins, as `parse` would give them."""
    if len(text) < 2:
        return []
    size = min(len(text) + 1, 2 * int(rng.integers(0, 5)))
    cuts = sorted(rng.choice(len(text) + 1, size=size - size % 2, replace=False).tolist())
    entities = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=True):
        if not text[start:end].strip():
            continue
        kinds = [(True, True), (True, False), (False, True)]
        box, mask = kinds[int(rng.integers(3))] if mixed else (with_box, with_mask)
        corners = np.sort(rng.integers(0, bins, size=(2, 2)), axis=0).ravel().tolist()
        entities.append(
            Entity(
                text[start:end],
                start,
                end,
                int(rng.integers(0, 122)) if box else 0,
                boxes.from_bins(corners, bins) if box else None,
                mask,
            )
        )
    return entities


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.box_order}-{f.bins}")
@pytest.mark.parametrize("kind", ["boxes", "masks", "joint", "mixed"])
def test_what_is_written_is_read_back_and_written_alike(fmt, kind):
    rng = np.random.default_rng(BINS.index(fmt.bins))
    with_box, with_mask = kind != "masks", kind != "boxes"
    written = 0
    for _ in range(60):
        text = random_text(rng)
        entities = random_entities(
            rng, text, fmt.bins, with_box=with_box, with_mask=with_mask, mixed=kind == "mixed"
        )
        marked = write(text, entities, fmt, boxes=with_box, masks=with_mask)
        parsed = parse(marked, fmt)
        assert parsed.text == text
        assert parsed.entities == tuple(entities)
        assert parsed.malformed == ()
        masks = [e.mask for e in entities]
        expected = [sum(masks[:i]) if mask else -1 for i, mask in enumerate(masks)]
        assert list(parsed.mask_indices) == expected
        again = write(parsed.text, parsed.entities, fmt, boxes=with_box, masks=with_mask)
        assert again == marked
        assert strip_marks(marked, fmt) == text
        written += len(entities)
    assert written > 20


MARKS = [LIVER, "</p>", "<seg>", "</seg>", "<p bbox=", "<p bbox=<loc0001><loc0002>"]
MARKS += ["<p bbox=<loc0001><loc0002><loc0003><loc0004>>", "<seg005>", "<loc0012>"]
MARKS += ["<p bbox=<loc0001><loc0002><loc0003><loc0004> id=<seg200>>"]
MARKS += ["<p bbox=<loc0001><loc0002><loc0003><loc0900> id=<seg001>>"]
MARKS += ["<p bbox=<loc0300><loc0002><loc0003><loc0004> id=<seg001>>"]


def test_removing_marks_from_any_string_leaves_exactly_the_text_between():
    rng = np.random.default_rng(0)
    words = ["liver", "Zyste ", " und ", "\n", "1.2 cm", "a < b", "ü", " x"]
    for _ in range(3_000):
        pieces, text, marks = [], [], 0
        for _ in range(int(rng.integers(0, 10))):
            if rng.random() < 0.5:
                pieces.append(str(rng.choice(words)))
                text.append(pieces[-1])
            else:
                pieces.append(str(rng.choice(MARKS)))
                marks += 1
        marked = "".join(pieces)
        parsed = parse(marked, OURS)
        assert parsed.text == "".join(text), marked
        assert strip_marks(marked, OURS) == parsed.text
        # Every mark is either part of an entity or reported.
        in_entities = sum(2 * (e.box is not None) + 2 * e.mask for e in parsed.entities)
        assert in_entities + len(parsed.malformed) <= marks
        assert bool(marks) == bool(parsed.entities or parsed.malformed)
        for entity in parsed.entities:
            assert parsed.text[entity.start : entity.end] == entity.mention


def mutate(rng, marked):
    """Cut, double, drop, swap or shuffle pieces of a marked text, or change its digits."""
    n = len(marked)
    a, b = sorted(rng.integers(0, n + 1, size=2).tolist())
    kind = int(rng.integers(6))
    if kind == 0:
        return marked[:a]
    if kind == 1:
        return marked[:b] + marked[a:b] + marked[b:]
    if kind == 2:
        return marked[:a] + marked[b:]
    if kind == 3:
        return marked[:a] + str(rng.choice(MARKS)) + marked[a:]
    if kind == 4:
        digits = [str(rng.integers(10)) if c.isdigit() else c for c in marked]
        return "".join(digits)
    return marked[b:] + marked[a:b] + marked[:a]


def test_the_reader_survives_mutations():
    rng = np.random.default_rng(1)
    broken = 0
    for fmt in (OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION, Format(bins=64)):
        for _ in range(500):
            text = random_text(rng, 3, 9)
            entities = random_entities(rng, text, 64, with_box=True, with_mask=True, mixed=True)
            marked = write(text, entities, Format(bins=64), masks=True)
            for _ in range(int(rng.integers(1, 4))):
                marked = mutate(rng, marked)
            parsed = parse(marked, fmt)
            broken += bool(parsed.malformed)
            position = 0
            for entity in parsed.entities:
                assert position <= entity.start < entity.end
                assert parsed.text[entity.start : entity.end] == entity.mention
                position = entity.end
            # What was read as an entity can be written and read again.
            if not spans.has_marks(parsed.text) and parsed.entities:
                again = write(
                    parsed.text, parsed.entities, fmt, boxes=fmt.has_boxes, masks=fmt.has_masks
                )
                assert parse(again, fmt).entities == parsed.entities
    assert broken > 300


# --- each defect by name --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marked", "text", "kinds", "mentions"),
    [
        (f"The {LIVER}liver is cut", "The liver is cut", ["unclosed"], []),
        ("<seg>liver is cut", "liver is cut", ["unclosed"], []),
        ("a</p> b</seg>", "a b", ["stray", "stray"], []),
        ("<p bbox=<loc0001><loc0002> id=>liver</p>", "liver", ["incomplete"], []),
        ("<p bbox=liver</p>", "liver", ["incomplete"], []),
        ("<p bbox=<loc0001>", "", ["incomplete"], []),
        (LIVER.replace("0379", "0512") + "liver</p>", "liver", ["bin_range"], []),
        (LIVER.replace("0379", "0097") + "liver</p>", "liver", ["inverted"], []),
        (LIVER.replace("0258", "0017") + "liver</p>", "liver", ["inverted"], []),
        (LIVER.replace("005", "000") + "liver</p>", "liver", ["unknown_class"], []),
        (LIVER.replace("005", "122") + "liver</p>", "liver", ["unknown_class"], []),
        (LIVER.replace("005", "999") + "liver</p>", "liver", ["unknown_class"], []),
        (f"a{LIVER}</p>b", "ab", ["empty"], []),
        (f"a{LIVER} </p>b", "a b", ["empty"], []),
        ("<seg></seg>", "", ["empty"], []),
        (f"{LIVER}<seg></seg></p>", "", ["empty"], []),
        ("x<loc0001>y<seg005>z", "xyz", ["stray", "stray"], []),
        ("x id=<seg005>>y", "xy", ["stray"], []),
        (f"{LIVER}a {LIVER}b</p> c</p>", "a b c", ["unclosed", "stray"], ["b"]),
        (f"{LIVER}a <seg>b</seg> c</p>", "a b c", ["unclosed", "stray"], ["b"]),
        (f"<seg>{LIVER}a</p></seg>", "a", ["unclosed", "stray"], ["a"]),
        (f"{LIVER}liver</p></p>", "liver", ["stray"], ["liver"]),
    ],
)
def test_defects(marked, text, kinds, mentions):
    parsed = parse(marked, OURS)
    assert parsed.text == text
    assert [m.kind for m in parsed.malformed] == kinds
    assert [e.mention for e in parsed.entities] == mentions
    for defect in parsed.malformed:
        assert marked[defect.start :].startswith(defect.snippet)


def test_equal_bins_are_a_thin_structure_not_a_defect():
    parsed = parse("<p bbox=<loc0007><loc0007><loc0007><loc0009>>septum</p>", OURS)
    assert parsed.malformed == () and len(parsed.entities) == 1
    assert parsed.entities[0].class_id == 0


def test_an_id_may_lack_only_where_the_format_says_so():
    marked = "<p bbox=<loc0001><loc0002><loc0003><loc0004>>nodule</p>"
    assert parse(marked, OURS).entities[0].class_id == 0
    parsed = parse(marked, PUBLISHED_DETECTION)
    assert parsed.entities == () and parsed.malformed[0].kind == "no_id"


def test_marks_that_the_format_lacks_are_reported_and_removed():
    for marked, fmt in (
        (f"{LIVER}liver</p>", PUBLISHED_SEGMENTATION),
        ("<seg>liver</seg>", PUBLISHED_DETECTION),
    ):
        parsed = parse(marked, fmt)
        assert parsed.text == "liver" and parsed.entities == ()
        assert [m.kind for m in parsed.malformed] == ["not_in_format"]


def test_a_mask_belongs_to_its_span_even_behind_an_empty_one():
    parsed = parse("<seg></seg> <seg>liver</seg></seg> <seg>spleen</seg>", OURS)
    assert [e.mention for e in parsed.entities] == ["liver", "spleen"]
    assert parsed.mask_indices == (1, 3)


def test_order_of_coordinates():
    entity = Entity("liver", 0, 5, 5, boxes.from_bins((1, 2, 3, 4), 512))
    assert write("liver", [entity], OURS).startswith("<p bbox=<loc0002><loc0001><loc0004><loc0003>")
    published = write("liver", [entity], PUBLISHED_DETECTION)
    assert published.startswith("<p bbox=<loc0001><loc0002><loc0003><loc0004> id=<seg005>>")


def test_joint_form():
    entity = Entity("liver", 4, 9, 5, boxes.from_bins((18, 98, 258, 379), 512), True)
    marked = write("The liver.", [entity], OURS, boxes=True, masks=True)
    assert marked == f"The {LIVER}<seg>liver</seg></p>."
    assert parse(marked, OURS).entities == (entity,)


BOX = (0.1, 0.1, 0.5, 0.5)


@pytest.mark.parametrize(
    ("entities", "options", "words"),
    [
        ([Entity("liver", 0, 5, 5, BOX), Entity("ver", 2, 5, 5, BOX)], {}, "overlaps"),
        ([Entity("liver", 0, 99, 5, BOX)], {}, "outside"),
        ([Entity("liver", -5, 5, 5, BOX)], {}, "outside"),
        ([Entity("", 3, 3, 5, BOX)], {}, "empty"),
        ([Entity(" ", 5, 6, 5, BOX)], {}, "stand there"),
        ([Entity("spleen", 0, 5, 5, BOX)], {}, "stand there"),
        ([Entity("liver", 0, 5, 5)], {}, "no box"),
        ([Entity("liver", 0, 5, 5, BOX)], {"boxes": False, "masks": True}, "no mask"),
        ([Entity("liver", 0, 5, 5, (0.5, 0.1, 0.1, 0.5))], {}, "swapped"),
        ([Entity("liver", 0, 5, 5, (0.1, float("nan"), 0.2, 0.5))], {}, "swapped"),
        ([Entity("liver", 0, 5, 122, BOX)], {}, "122"),
        ([Entity("liver", 0, 5, 0, BOX)], {"fmt": PUBLISHED_DETECTION}, "requires an id"),
        ([], {"fmt": PUBLISHED_SEGMENTATION}, "no tokens for boxes"),
        ([], {"fmt": PUBLISHED_DETECTION, "masks": True}, "no tokens for masks"),
    ],
)
def test_writing_refuses(entities, options, words):
    options = dict(options)
    with pytest.raises(ValueError, match=words):
        write("liver is normal", entities, options.pop("fmt", OURS), **options)


@pytest.mark.parametrize(
    "text", ["<p bbox=", "a</p>", "<seg>", "<loc0001>", "id=<seg001>", "<seg127>"]
)
def test_writing_refuses_text_with_marks(text):
    with pytest.raises(ValueError, match="already holds"):
        write(text, [], OURS)


def test_dangerous_mentions_do_no_harm():
    text = r"p id bbox seg \1 (IVa) and liver"
    mentions = [("p", 1), ("id", 2), ("bbox", 3), ("seg", 4), (r"\1", 5), ("(IVa)", 6), ("", 7)]
    entities = [
        dataclasses.replace(e, box=boxes.from_bins((0, 0, 9, 9), 512))
        for e in tag(text, [*mentions, ("liver", 5)], range(1, 122))
    ]
    assert [e.mention for e in entities] == ["p", "id", "bbox", "seg", r"\1", "(IVa)", "liver"]
    assert parse(write(text, entities, OURS), OURS).entities == tuple(entities)


def test_tagging_rules():
    text = "Liver and liver segment IV, Leberwert; liver"
    both = [("liver", 5), ("liver segment IV", 5)]
    assert [e.mention for e in tag(text, both, {5})] == ["liver segment IV", "liver"]
    folded = tag(text, [("LIVER", 5), ("liver segment IV", 5)], {5}, ignore_case=True)
    assert [e.mention for e in folded] == ["Liver", "liver segment IV", "liver"]
    assert tag(text, both, set()) == []
    # The longer mention has no place, so the shorter one stands for itself.
    assert len(tag(text, [("liver", 5), ("liver segment IV", 6)], lambda i: i == 5)) == 2
    # Two classes for one mention: the first listed that has a place.
    assert tag("kidney", [("kidney", 2), ("kidney", 3)], {2, 3})[0].class_id == 2
    assert tag("kidney", [("kidney", 2), ("kidney", 3)], {3})[0].class_id == 3
    assert tag("Niere", [("NIERE", 3), ("niere", 2)], {2, 3}, ignore_case=True)[0].class_id == 3


def test_mentions_may_have_keys_that_are_no_classes():
    found = spans.find_mentions(
        "Left lung and Pneumonia", [("Pneumonia", "Pneumonia")], {"Pneumonia"}
    )
    assert found == [(14, 23, "Pneumonia")]


@pytest.mark.parametrize("style", ["ours", "published"])
def test_both_styles_agree_on_well_formed_marks(style):
    assert strip_marks(f"The {LIVER}liver</p>.", PUBLISHED_DETECTION, style) == "The liver."
    assert strip_marks("The <seg>liver</seg>.", PUBLISHED_SEGMENTATION, style) == "The liver."


def test_the_published_remover_swallows_and_ours_does_not():
    marked = f"<p bbox=<loc0018> id=>liver</p> and {LIVER}spleen</p>."
    assert strip_marks(marked, PUBLISHED_DETECTION, "published") == "spleen."
    assert strip_marks(marked, PUBLISHED_DETECTION) == "liver and spleen."
    with pytest.raises(ValueError, match="'new'"):
        strip_marks(marked, OURS, "new")
