"""Text cleaning: the published style to the letter, and our own rules."""

import json
import unicodedata

import numpy as np
import pytest

from rg_jax.grounding.cleaning import clean_text


def test_clean_punctuation_golden_published_style(golden):
    cases = json.loads((golden / "clean_punctuation.json").read_text("utf-8"))["clean_punctuation"]
    assert cases
    for case in cases:
        assert clean_text(case["in"], style="published") == case["out"], case
        if case.get("second_pass") is not None:
            assert clean_text(case["out"], style="published") == case["second_pass"], case


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("  \n ", ""),
        (" ; ", ""),
        ("Liver normal", "Liver normal."),
        ("Liver normal .", "Liver normal."),
        ("Really ?", "Really?"),
        ("normal:", "normal."),
        ("normal ;", "normal."),
        ("lesion of 1.2 cm", "lesion of 1.2 cm."),
        ("Zyste 3,5 mm", "Zyste 3,5 mm."),
        ("12:30 Uhr", "12:30 Uhr."),
        ("10.000 Einheiten", "10.000 Einheiten."),
        ("z.B. Leber", "z.B. Leber."),
        ("d.h. normal", "d.h. normal."),
        ("i.e. normal", "i.e. normal."),
        ("Zyste, z.B", "Zyste, z.B."),
        ("Fraktur Th12.", "Fraktur Th12."),
        ("Fraktur von Th.12 , Spleen 1.2 cm", "Fraktur von Th.12, Spleen 1.2 cm."),
        ("first,second", "first, second."),
        ("first,second;third:fourth", "first, second; third: fourth."),
        ("BWK 12.Fraktur", "BWK 12. Fraktur."),
        ("M.psoas", "M. psoas."),
        ("i.e.the liver", "i.e. the liver."),
        ("a .b ,c", "a. b, c."),
        ("really?!yes", "really?! yes."),
        ("dots... and more...", "dots... and more..."),
        ("line one \nline two", "line one\nline two."),
        ("line one.\r\n\r\n  line two", "line one.\nline two."),
        ("two  blanks", "two blanks."),
        ("nb\u00a0space, soft\u00adhyphen, zero\u200bwidth", "nb space, softhyphen, zerowidth."),
        ("dash\u0096here \u0084low\u0093", 'dash-here "low".'),
        ("wait\u0085next", "wait... next."),
        ("U\u0308bergang", "Übergang."),
        ("abc.\u200b", "abc."),
        ('Befund "normal."', 'Befund "normal."'),
        ("Zyste (klein)", "Zyste (klein)."),
        ("C5/6 , C6/7 .", "C5/6, C6/7."),
    ],
)
def test_our_rules(text, cleaned):
    assert clean_text(text) == cleaned
    assert clean_text(cleaned) == cleaned


def test_cleaning_twice_changes_nothing():
    rng = np.random.default_rng(0)
    alphabet = list("aBzüß 1 2..,,::;;!?()\"'-\n\t/") + [
        *("\u00a0", "\u00ad", "\u200b", "\u0085", "\u0096", "\u0084", "\u0308", "\u2028", "\r"),
        *("z.B.", "Th12", "1.2", "\u200d", "\ufeff", "\u3000", "\u0000", "\u202f"),
    ]
    for _ in range(8_000):
        text = "".join(rng.choice(alphabet, size=int(rng.integers(0, 14))))
        once = clean_text(text)
        assert clean_text(once) == once, repr(text)
        assert not once or once[-1] not in ",:; \n"
        assert not any(unicodedata.category(c) in ("Cc", "Cf") and c != "\n" for c in once)


def test_no_letter_or_digit_is_lost():
    rng = np.random.default_rng(1)
    alphabet = list("abÄß19 .,:;!?")
    for _ in range(2_000):
        text = "".join(rng.choice(alphabet, size=12))
        kept = [c for c in clean_text(text) if c.isalnum()]
        assert kept == [c for c in text if c.isalnum()]


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match="'theirs'"):
        clean_text("a", style="theirs")
