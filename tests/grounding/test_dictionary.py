"""The offline dictionary: what is a mention, and above all what is not."""

import json
import os
import time
from pathlib import Path

import pytest

from rg_jax.grounding import anatomy, dictionary

# Sentences of our own: what stands in them and nothing else.
ENGLISH = {
    # Sides
    "The left kidney is atrophic.": {"left kidney": "kidney_left"},
    "Cyst in the kidney on the left side.": {"kidney on the left side": "kidney_left"},
    "Kidney on the right: normal.": {"Kidney on the right": "kidney_right"},
    "Left-sided adrenal gland thickened.": {"Left-sided adrenal gland": "adrenal_gland_left"},
    "Left and right kidney of equal size.": {"right kidney": "kidney_right"},
    "Fracture of the left proximal humerus.": {"left proximal humerus": "humerus_left"},
    "Stone in the kidney.": {},
    "Both kidneys are normal, kidneys without stones.": {},
    "Left kidneys": {},
    "The kidney, left ureter and bladder are normal.": {"bladder": "urinary_bladder"},
    "Consolidation of the lung right lower lobe.": {"right lower lobe": "lung_lower_lobe_right"},
    # Lobes
    "Nodule in the upper lobe of the left lung.": {
        "upper lobe of the left lung": "lung_upper_lobe_left"
    },
    "Atelectasis of the middle lobe and the lingula.": {
        "middle lobe": "lung_middle_lobe_right",
        "lingula": "lung_upper_lobe_left",
    },
    "Ground-glass opacity in the RUL.": {"RUL": "lung_upper_lobe_right"},
    "Opacity in the lower lobe.": {},
    "Metastasis in the right lobe of the liver.": {"right lobe of the liver": "liver"},
    "Lesion in segments VI/VII of the liver.": {"segments VI/VII of the liver": "liver"},
    "Lesion in liver segment 4a and in hepatic segments VI and VII.": {
        "liver segment 4a": "liver",
        "hepatic segments VI and VII": "liver",
    },
    "Polyp at the hepatic flexure, gas in the splenic flexure of the colon.": {
        "hepatic flexure": "colon",
        "colon": "colon",
    },
    # Vertebrae, ribs
    "Compression fracture of L1.": {"L1": "vertebrae_L1"},
    "Fractures of Th8, T12 and of the fifth lumbar vertebra.": {
        "Th8": "vertebrae_T8",
        "T12": "vertebrae_T12",
        "fifth lumbar vertebra": "vertebrae_L5",
    },
    "Vertebral body of L3 and body of C7 intact.": {
        "Vertebral body of L3": "vertebrae_L3",
        "body of C7": "vertebrae_C7",
    },
    "Protrusion at L4/5 and L5/S1, fusion C5-C7, range T11–L2.": {},
    "T2 hyperintense lesion, T1 hypointense, tumor stage T3 N1.": {},
    "Compression of the L5 nerve root, the nerve root S1 is free, nerve roots L4.": {},
    "Fracture of the 9th rib on the left.": {"9th rib on the left": "rib_left_9"},
    "Healed fracture of the twelfth right rib.": {"twelfth right rib": "rib_right_12"},
    "Fracture of the left 3rd rib and of rib 4 on the right.": {
        "left 3rd rib": "rib_left_3",
        "rib 4 on the right": "rib_right_4",
    },
    "Rib fractures on the left, ninth rib without fracture.": {},
    # Not the organ
    "Elevated liver enzymes, heart failure, impaired liver function.": {},
    "Hepatic veins patent, renal arteries normal, aortic valve calcification.": {},
    "Adrenal insufficiency, renal failure, a renal mass, gastric banding.": {},
    "Hepatic cyst in segment VI, splenic infarct, pancreatic carcinoma.": {
        "Hepatic cyst": "liver",
        "splenic infarct": "spleen",
        "pancreatic carcinoma": "pancreas",
    },
    "Left renal mass, adrenal nodule on the right, abdominal aortic aneurysm.": {
        "Left renal mass": "kidney_left",
        "adrenal nodule on the right": "adrenal_gland_right",
        "abdominal aortic aneurysm": "aorta",
    },
    "Thyroid cartilage and sigmoid sinus are intact.": {},
    "Viewed in the lung window on the right.": {},
    "The para-aortic nodes and the pre-liver fat are normal.": {},
    "Post-contrast, the left kidney-shaped mass enhances.": {},
    "The livers of animals, cardiac output, gastritis, colonic wall": {"colonic wall": "colon"},
    "The middle lobe of the prostate is enlarged.": {"middle lobe of the prostate": "prostate"},
    "The renal vein on the left is patent, the left adrenal vein too.": {},
    "Right atrial appendage without thrombus.": {},
    "": {},
    # Names
    "IVC and SVC are patent, portal vein and splenic vein too.": {
        "IVC": "inferior_vena_cava",
        "SVC": "superior_vena_cava",
        "portal vein and splenic vein": "portal_vein_and_splenic_vein",
    },
    "THE RIGHT KIDNEY IS NORMAL.": {"RIGHT KIDNEY": "kidney_right"},
    "Spleen normal. The spleen is small.": {"Spleen": "spleen"},
    "Left iliac artery aneurysm, right common carotid artery normal.": {
        "Left iliac artery": "iliac_artery_left",
        "right common carotid artery": "common_carotid_artery_right",
    },
    "Left gluteus medius muscle and psoas on the right atrophic.": {
        "Left gluteus medius muscle": "gluteus_medius_left",
        "psoas on the right": "iliopsoas_right",
    },
    "Cyst: left renal cyst of 3.5 cm.": {"left renal cyst": "kidney_cyst_left"},
    "Dilated small-bowel loops.": {"small-bowel loops": "small_bowel"},
    "Liver,spleen and gall bladder are normal.": {
        "Liver": "liver",
        "spleen": "spleen",
        "gall bladder": "gallbladder",
    },
}
GERMAN = {
    # Seiten und Beugung
    "Linke Niere unauffällig.": {"Linke Niere": "kidney_left"},
    "Zyste an der linken Niere, mit linker Niere.": {
        "linken Niere": "kidney_left",
        "linker Niere": "kidney_left",
    },
    "Konkrement der Niere links.": {"Niere links": "kidney_left"},
    "Aufstau der re. Niere, Niere li. unauffällig.": {
        "re. Niere": "kidney_right",
        "Niere li": "kidney_left",
    },
    "Die rechte hydronephrotische Niere ist vergrößert.": {
        "rechte hydronephrotische Niere": "kidney_right"
    },
    "Linke und rechte Niere gleich groß.": {"rechte Niere": "kidney_right"},
    "Beide Nieren ohne Aufstau, die Nieren sind normal groß.": {},
    "Die Niere ist normal, Nierenzyste.": {},
    "Nieren beidseits und Nebennieren bds. unauffällig.": {},
    "Raumforderung der Nebenniere auf der rechten Seite.": {
        "Nebenniere auf der rechten Seite": "adrenal_gland_right"
    },
    "Fraktur des linken distalen Humerus.": {"linken distalen Humerus": "humerus_left"},
    "Zyste im rechten Leberlappen, Rechter Leberlappen vergrößert.": {
        "rechten Leberlappen": "liver",
        "Rechter Leberlappen": "liver",
    },
    # Lappen
    "Rundherd im rechten Oberlappen und im Unterlappen der linken Lunge.": {
        "rechten Oberlappen": "lung_upper_lobe_right",
        "Unterlappen der linken Lunge": "lung_lower_lobe_left",
    },
    "Mittellappenatelektase, Verschattung des Mittellappens.": {
        "Mittellappenatelektase": "lung_middle_lobe_right",
        "Mittellappens": "lung_middle_lobe_right",
    },
    "Infiltrat im UL rechts.": {"UL rechts": "lung_lower_lobe_right"},
    "Dystelektase im Unterlappen.": {},
    "Metastasen in den Lebersegmenten VI und VII.": {"Lebersegmenten VI und VII": "liver"},
    "Herd im Segment IVa der Leber.": {"Segment IVa der Leber": "liver"},
    # Wirbel und Rippen
    "Sinterungsfraktur von LWK 1, BWK12 und des 11. Brustwirbels.": {
        "LWK 1": "vertebrae_L1",
        "BWK12": "vertebrae_T12",
        "11. Brustwirbels": "vertebrae_T11",
    },
    "Fraktur des 4. LWK und HWK 7.": {"4. LWK": "vertebrae_L4", "HWK 7": "vertebrae_C7"},
    "Th12 und L1 unauffällig.": {"Th12": "vertebrae_T12", "L1": "vertebrae_L1"},
    "Deckplatteneinbruch am Wirbelkörper L3.": {"Wirbelkörper L3": "vertebrae_L3"},
    "Protrusion LWK 4/5 und L5/S1, Versteifung BWK 11-12, C5-C7.": {},
    "Kompression der Nervenwurzel L5, L4-Syndrom.": {},
    "T2w hyperintens, in T1 hypointens, T2 hyperintens, pT3.": {},
    "Fraktur der 9. Rippe links und der linken siebten Rippe.": {
        "9. Rippe links": "rib_left_9",
        "linken siebten Rippe": "rib_left_7",
    },
    "Fraktur der 5. rechten Rippe und der 6. Rippe lateral links.": {
        "5. rechten Rippe": "rib_right_5",
        "6. Rippe lateral links": "rib_left_6",
    },
    "Rippenfraktur links, 9. Rippe.": {},
    "Die Wirbelkörper sind normal hoch, Wirbelkörpers LWK 2.": {
        "Wirbelkörper": "vertebrae",
        "LWK 2": "vertebrae_L2",
    },
    # Nicht das Organ
    "Leberwerte erhöht, Leber-MRT, Leber- und Nierenwerte, Herzinsuffizienz.": {},
    "Lebervenen, Magenschleimhaut, Aortenklappe, Blasenkatheter.": {},
    "Niereninsuffizienz, Lungenembolie links, Herzinfarkt, Aortenklappenverkalkung.": {},
    "Hepatische Steatose, renale Zyste, gastrale Varizen.": {},
    "Nierenbecken links, Nierenarterie rechts, Nierenvene links.": {},
    "Vena cava und Hohlvene unauffällig.": {},
    "Links eine Niere, rechts keine.": {},
    "Hirnödem, Wirbelsäule, Rippenserienfraktur links, Wirbelkörperhöhe.": {},
    # Eine Struktur und ein Befund in ihr, in einem Wort
    "Leberzyste im Segment IV, multiple Lebermetastasen und ein LEBERHÄMANGIOM.": {
        "Leberzyste": "liver",
        "Lebermetastasen": "liver",
        "LEBERHÄMANGIOM": "liver",
    },
    "Milzinfarkt, Gallenblasensteine, Pankreaskopfkarzinom, Prostatahyperplasie.": {
        "Milzinfarkt": "spleen",
        "Gallenblasensteine": "gallbladder",
        "Pankreaskopfkarzinom": "pancreas",
        "Prostatahyperplasie": "prostate",
    },
    "Sigmadivertikulose, Magenwandverdickung, Schilddrüsenknoten links.": {
        "Sigmadivertikulose": "colon",
        "Magenwandverdickung": "stomach",
        "Schilddrüsenknoten": "thyroid_gland",
    },
    "Nierenkonkrement rechts, linksseitiger Nierentumor, Nebennierenadenome.": {
        "Nierenkonkrement rechts": "kidney_right",
        "linksseitiger Nierentumor": "kidney_left",
    },
    "Unterlappenatelektasen links, Lungenrundherde, rechter Psoasabszess.": {
        "Unterlappenatelektasen links": "lung_lower_lobe_left",
        "rechter Psoasabszess": "iliopsoas_right",
    },
    "Bauchaortenaneurysma, Pfortaderthrombose und Milzvenenthrombose, VCI frei.": {
        "Bauchaortenaneurysma": "aorta",
        "Pfortaderthrombose": "portal_vein_and_splenic_vein",
        "Milzvenenthrombose": "portal_vein_and_splenic_vein",
        "VCI": "inferior_vena_cava",
    },
    "Humeruskopffraktur rechts, Femurkopfnekrose links, Sternumfraktur.": {
        "Humeruskopffraktur rechts": "humerus_right",
        "Femurkopfnekrose links": "femur_left",
        "Sternumfraktur": "sternum",
    },
    "Ältere LWK-1-Fraktur, Leber-Metastase, Arthrose des linken Hüftgelenks.": {
        "LWK-1": "vertebrae_L1",
        "Leber": "liver",
        "linken Hüftgelenks": "hip_left",
    },
    "Bandscheibenvorfall, Wirbelkörperfraktur LWK 2.": {
        "Bandscheibenvorfall": "intervertebral_discs",
        "LWK 2": "vertebrae_L2",
    },
    # Namen
    "Unauffällige Darstellung von Leber, Milz, Pankreas und Magen.": {
        "Leber": "liver",
        "Milz": "spleen",
        "Pankreas": "pancreas",
        "Magen": "stomach",
    },
    "Verkalkung der V. cava inferior, Thrombus der oberen Hohlvene.": {
        "V. cava inferior": "inferior_vena_cava",
        "oberen Hohlvene": "superior_vena_cava",
    },
    "LEBER UNAUFFÄLLIG.": {"LEBER": "liver"},
    "Linker M. psoas und Psoasmuskel rechts atroph.": {
        "Linker M. psoas": "iliopsoas_left",
        "Psoasmuskel rechts": "iliopsoas_right",
    },
    "Arthrose des rechten Hüftbeins, Läsion im linken Schulterblatt.": {
        "rechten Hüftbeins": "hip_right",
        "linken Schulterblatt": "scapula_left",
    },
    "Kalk in der A. iliaca communis links.": {"A. iliaca communis links": "iliac_artery_left"},
    "Kein Nachweis von Metastasen des Gehirns.": {"Gehirns": "brain"},
    "Ösophagus, Trachea und Schilddrüse regelrecht.": {
        "Ösophagus": "esophagus",
        "Trachea": "trachea",
        "Schilddrüse": "thyroid_gland",
    },
    "Linke Nierenzyste von 3,5 cm.": {"Linke Nierenzyste": "kidney_cyst_left"},
}
ALL = [("en", *item) for item in ENGLISH.items()] + [("de", *item) for item in GERMAN.items()]


@pytest.mark.parametrize(("language", "sentence", "expected"), ALL)
def test_sentences_of_our_own(language, sentence, expected):
    assert dictionary.mentions(sentence, language) == expected


@pytest.mark.parametrize(
    ("language", "sentence", "expected"),
    [
        ("en", "Both kidneys are normal.", [("Both kidneys", "kidney_right", "kidney_left")]),
        ("en", "Lungs clear.", [("Lungs", "lung_right", "lung_left")]),
        (
            "en",
            "Left and right adrenal gland slender.",
            [("Left and right adrenal gland", "adrenal_gland_right", "adrenal_gland_left")],
        ),
        ("de", "Nieren bds. normal.", [("Nieren bds", "kidney_right", "kidney_left")]),
        ("de", "Beide Nieren.", [("Beide Nieren", "kidney_right", "kidney_left")]),
        ("de", "Niere ohne Stein.", []),
        ("en", "Left kidneys", []),
    ],
)
def test_both_sides_only_where_asked_for(language, sentence, expected):
    found = dictionary.find(sentence, language, both=True)
    assert [(one.text, *one.classes) for one in found] == expected
    assert all(len(one.classes) == 1 for one in dictionary.find(sentence, language))
    assert all(sentence[one.start : one.end] == one.text for one in found)


@pytest.mark.parametrize("language", dictionary.languages())
def test_every_name_of_the_schema_is_found_and_never_inside_a_word(language):
    for entry in anatomy.CLASSES:
        for number, form in enumerate(anatomy.mentions(entry.id, language)):
            assert dictionary.mentions(f"Sei {form} so.", language) == {form: entry.name}
            if number > 1:  # two of each class: the check is slow where types are checked
                continue
            inside = dictionary.find(f"x{form}x", language, both=True)
            assert all(len(one.text) < len(form) for one in inside), form


@pytest.mark.parametrize("language", dictionary.languages())
def test_every_class_has_a_form_with_its_side(language):
    sides = {"left": ("left", "linke"), "right": ("right", "rechte")}
    for entry in anatomy.CLASSES:
        other = {"_left": "right", "_right": "left"}
        for ending, wrong in other.items():
            if entry.name.endswith(ending):
                for form in anatomy.mentions(entry.id, language):
                    words = form.casefold().split()
                    assert not set(words) & set(sides[wrong]), (entry.name, form)


def test_mentions_do_not_overlap_and_are_in_order():
    text = " ".join(ENGLISH)
    found = dictionary.find(text, "en", both=True)
    assert len(found) > 40
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="en, de, not 'fr'"):
        dictionary.find("foie", "fr")


@pytest.mark.parametrize(
    ("section", "name", "forms", "message"),
    [
        ("single", "lever", ["lever"], "'lever' is not in the schema"),
        ("single", "spleen", ["spleen", "liver"], "'liver' names both spleen and liver"),
        ("paired", "lever", ["lever"], "'lever_right' is not in the schema"),
    ],
)
def test_a_slip_in_the_data_is_refused(section, name, forms, message):
    words = json.loads(json.dumps(dictionary._tables()["en"]))
    words[section][name] = forms
    with pytest.raises(ValueError, match=message):
        dictionary._Dictionary("en", words)


def test_thousands_of_sentences_a_second():
    sentences = list(GERMAN) * 5
    dictionary.mentions("warm", "de")
    started = time.process_time()  # of this process alone: the machine may be busy
    for sentence in sentences:
        dictionary.mentions(sentence, "de")
    # About 5,000/s on a quiet core; a bound that also holds where types are checked.
    assert len(sentences) / (time.process_time() - started) > 200


@pytest.mark.parametrize("language", dictionary.languages())
def test_the_small_corpus_is_met(language):
    root = os.environ.get("REFRAD2D_ROOT")
    if not root:
        pytest.skip("REFRAD2D_ROOT does not point to refrad2d_mini")
    file = Path(root) / f"keywords_{language}.json"
    if not file.is_file():
        pytest.skip(f"REFRAD2D_ROOT holds no {file.name}")
    reference = json.loads(file.read_text(encoding="utf-8"))
    wanted = {(s, m, c) for s, found in reference.items() for m, c in found.items()}
    got = {(s, m, c) for s in reference for m, c in dictionary.mentions(s, language).items()}
    assert len(wanted & got) / len(got) > 0.95
    assert len(wanted & got) / len(wanted) > 0.95
