"""The class schema: ids, names, TotalSegmentator's numbering."""

import importlib.util
import re

import pytest

from rg_jax.grounding import anatomy

WORDS_OF_LANGUAGE = {"en": ("left", "right"), "de": ("link", "recht")}


def test_ids_are_the_places_in_the_list():
    assert [entry.id for entry in anatomy.CLASSES] == list(range(1, 122))
    assert len({entry.name for entry in anatomy.CLASSES}) == anatomy.NUM_CLASSES == 121


def test_known_ids():
    for class_id, name in (
        *((1, "spleen"), (2, "kidney_right"), (3, "kidney_left"), (4, "gallbladder"), (5, "liver")),
        *((51, "heart"), (52, "aorta"), (79, "spinal_cord"), (90, "brain"), (91, "skull")),
        *((92, "rib_left_1"), (103, "rib_left_12"), (104, "rib_right_1"), (115, "rib_right_12")),
        *((116, "sternum"), (117, "costal_cartilages"), (118, "lung_left"), (119, "lung_right")),
        *((120, "intervertebral_discs"), (121, "vertebrae"), (32, "vertebrae_T12")),
    ):
        assert anatomy.name_of(class_id) == name
        assert anatomy.id_of(name) == class_id


def test_unknown_classes_are_named():
    for class_id in (0, -1, 122, 261):
        with pytest.raises(ValueError, match=str(class_id)):
            anatomy.name_of(class_id)
    with pytest.raises(ValueError, match="appendix"):
        anatomy.id_of("appendix")
    with pytest.raises(ValueError, match="'fr'"):
        anatomy.display(5, "fr")


@pytest.mark.parametrize("language", ["en", "de"])
def test_display_names_are_distinct_and_say_the_side(language):
    names = [anatomy.display(i, language) for i in range(1, 122)]
    assert all(names) and len(set(names)) == 121
    left, right = WORDS_OF_LANGUAGE[language]
    for entry, name in zip(anatomy.CLASSES, names, strict=True):
        assert ("left" in entry.name) == (re.search(rf"\b{left}", name) is not None), name
        assert ("right" in entry.name) == (re.search(rf"\b{right}", name) is not None), name
        number = re.search(r"_(?:[CTLS])?(\d+)$", entry.name)
        if number and language == "de":
            assert re.search(rf"\b{number.group(1)}\b", name), name


@pytest.mark.parametrize("language", ["en", "de"])
def test_a_mention_form_names_one_class_only(language):
    owner = {}
    for entry in anatomy.CLASSES:
        for form in anatomy.mentions(entry.id, language):
            assert form == form.strip() and form
            assert owner.setdefault(form.lower(), entry.id) == entry.id, form


@pytest.mark.parametrize("language", ["en", "de"])
def test_mention_forms_keep_the_side(language):
    left, right = WORDS_OF_LANGUAGE[language]
    for entry in anatomy.CLASSES:
        for form in anatomy.mentions(entry.id, language):
            if "_left" in entry.name:
                assert not re.search(rf"\b{right}", form, re.IGNORECASE), form
            if "_right" in entry.name:
                assert not re.search(rf"\b{left}", form, re.IGNORECASE), form


def test_sides_are_named_in_both_orders():
    assert {"left kidney", "kidney left"} <= set(anatomy.mentions(3, "en"))
    assert {"linke Niere", "linken Niere", "Niere links"} <= set(anatomy.mentions(3, "de"))


# The class names of TotalSegmentator's task total_mr, in the order of its ids 1..50.
SIDED = "iliac_artery iliac_vena humerus scapula clavicula femur hip"
SIDED_MUSCLES = "gluteus_maximus gluteus_medius gluteus_minimus autochthon iliopsoas"
TOTAL_MR_NAMES = [
    *["spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas"],
    *["adrenal_gland_right", "adrenal_gland_left", "lung_left", "lung_right", "esophagus"],
    *["small_bowel", "duodenum", "colon", "urinary_bladder", "prostate", "sacrum", "vertebrae"],
    *["intervertebral_discs", "spinal_cord", "heart", "aorta", "inferior_vena_cava"],
    "portal_vein_and_splenic_vein",
    *(f"{name}_{side}" for name in SIDED.split() for side in ("left", "right")),
    *(f"{name}_{side}" for name in SIDED_MUSCLES.split() for side in ("left", "right")),
    "brain",
]


def test_mr_ids():
    assert len(TOTAL_MR_NAMES) == 50
    assert {
        i: anatomy.id_of(name) for i, name in enumerate(TOTAL_MR_NAMES, start=1)
    } == anatomy.TOTAL_MR_TO_OURS


def test_ct_names_count_ribs_and_vertebrae_the_way_totalsegmentator_does():
    spine = ["S1", *(f"L{i}" for i in range(5, 0, -1)), *(f"T{i}" for i in range(12, 0, -1))]
    spine += [f"C{i}" for i in range(7, 0, -1)]
    assert [anatomy.name_of(i) for i in range(26, 51)] == [f"vertebrae_{v}" for v in spine]
    ribs = [f"rib_{side}_{i}" for side in ("left", "right") for i in range(1, 13)]
    assert [anatomy.name_of(i) for i in range(92, 116)] == ribs


def test_the_schema_agrees_with_totalsegmentator_where_installed():
    if importlib.util.find_spec("totalsegmentator") is None:
        return  # the two tests above state the same from memory
    from totalsegmentator.map_to_binary import class_map

    assert class_map["total"] == {i: anatomy.name_of(i) for i in range(1, 118)}
    assert list(class_map["total_mr"].values()) == TOTAL_MR_NAMES


def test_absent_classes_never_hold_what_the_slice_may_show():
    absent = anatomy.absent_classes({10, 28, 5}, "CT")
    assert not {10, 28, 5} & set(absent)
    assert max(absent) == 117  # the MR-only classes cannot be found in CT at all
    assert set(anatomy.absent_classes({5}, "MR")) == anatomy.SEGMENTED_IN["MR"] - {5}
    everything = anatomy.absent_classes({10, 28}, "XR")
    assert 118 not in everything and 121 not in everything and 119 in everything
    assert not set(range(26, 51)) & set(anatomy.absent_classes({121}, "XR"))
    with pytest.raises(ValueError, match="122"):
        anatomy.absent_classes({122}, "CT")
