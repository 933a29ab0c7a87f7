"""Mentions that cannot stand for the class they are listed with, by their own words.

Lists of mentions come from language models. What the organ dictionary knows better, a wrong side
and words that name nothing are found here; a wrong class for words it does not know is not.
"""

import functools
import re

from rg_jax.grounding import dictionary

# Words by which a text speaks of a side, so that a class of that side can be meant.
SIDE_WORDS = {
    "en": {
        "left": r"\b(?:left|L[UL]L|lingula\w*|both|bilateral\w*)\b",
        "right": r"\b(?:right|R[UML]L|both|bilateral\w*)\b",
    },
    "de": {
        "left": r"\b(?:link\w*|li|lingula\w*|beid\w*|bds)\b",
        "right": r"\b(?:recht\w*|re|beid\w*|bds)\b",
    },
}
ONE_SIDED = {"lung_middle_lobe_right", "atrial_appendage_left"}  # there is no other
# Alone or together they name no structure.
_FUNCTION_WORDS = {
    "en": """
a an the this that these those is are was were be been being has have had do does did not no nor and
or but if of in on at to from by for with without within into as than then so it its they them their
he she his her we our you i there here which who whose what both each any all some more most less
other same such also only very now again left right normal abnormal seen shown noted unremarkable cm
mm ml hu""",
    "de": """
ein eine einer eines einem einen der die das des dem den dieser diese dieses ist sind war waren
sein hat haben kein keine keiner keines keinen nicht noch und oder aber wenn von vom in im an am
auf zu zum zur aus bei beim für mit ohne als so es er sie ihr ihre wir hier da dort welche welcher
welches was beide beiden beidseits jede jeder alle einige mehr weniger andere auch nur sehr jetzt
wieder links rechts linke rechte normal unauffällig auffällig sichtbar cm mm ml he nach vor über
unter zwischen sowie bis durch um""",
}


def side_of(name: str) -> str:
    """ "left" or "right" for a class that has a counterpart on the other side, else ""."""
    side = next((s for s in ("left", "right") if s in name.split("_")), "")
    return "" if name in ONE_SIDED else side


@functools.lru_cache(maxsize=4096)  # reports name the same things over and over
def contradiction(mention: str, name: str, language: str) -> str:
    """Why `mention` cannot stand for the class of this name, in a few words; "" if it can.

    `language`: "en" or "de". The words around the mention are not known here.
    """
    words = re.findall(r"[^\W_]+", mention.casefold())
    if not any(word not in _function_words(language) and not word.isdigit() for word in words):
        return "mention names nothing"
    for one in dictionary.find(mention, language):
        whole = one.text == mention and one.classes != (name,)
        # "the vertebral body" may be a certain one, as the rest of the sentence tells.
        if whole and not (one.classes == ("vertebrae",) and name.startswith("vertebrae_")):
            return "mention names another class"
    if side := side_of(name):
        table, other = SIDE_WORDS[language], "left" if side == "right" else "right"
        if re.search(table[other], mention, re.IGNORECASE) and not re.search(
            table[side], mention, re.IGNORECASE
        ):
            return "mention names the other side"
    return ""


@functools.cache
def _function_words(language: str) -> frozenset[str]:
    return frozenset(_FUNCTION_WORDS[language].split())
