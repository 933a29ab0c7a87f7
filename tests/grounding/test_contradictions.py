"""Mentions whose own words speak against the class they are listed with."""

import pytest

from rg_jax.grounding.contradictions import contradiction


@pytest.mark.parametrize(
    "mention, name, language, reason",
    [
        ("left kidney", "kidney_right", "en", "mention names another class"),
        ("linke Niere", "kidney_right", "de", "mention names another class"),
        ("the one on the left", "kidney_right", "en", "mention names the other side"),
        ("der rechte Anteil", "kidney_left", "de", "mention names the other side"),
        ("Leber", "spleen", "de", "mention names another class"),
        ("is", "spleen", "en", "mention names nothing"),
        ("in the", "spleen", "en", "mention names nothing"),
        ("12", "spleen", "en", "mention names nothing"),
        ("und nicht", "spleen", "de", "mention names nothing"),
        ("left kidney", "kidney_left", "en", ""),
        ("kidneys on both sides", "kidney_right", "en", ""),
        ("middle lobe", "lung_middle_lobe_right", "en", ""),
        ("the vertebral body", "vertebrae_L2", "en", ""),
        ("Raumforderung", "liver", "de", ""),
        ("upper pole", "kidney_left", "en", ""),
    ],
)
def test_contradiction(mention, name, language, reason):
    assert contradiction(mention, name, language) == reason
