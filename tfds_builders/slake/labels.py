"""SLAKE's labels: which of our classes they are, how they are named, and where they can occur.

SLAKE draws boxes for 39 structures and lesions of its mask table and for a few findings that have
no mask. A label has a class of our schema only where the two mean the same thing: a femoral head is
not a femur, so it has none.
"""

from dataclasses import dataclass

from rg_jax.grounding.anatomy import display, id_of

# From head to foot. A label's zone is where it can be seen; see `surely_absent`.
ZONES = ("head", "neck", "chest", "abdomen", "pelvis")
_LOCATIONS = {"brain": "head", "head": "head", "neck": "neck", "lung": "chest", "chest": "chest"}
_LOCATIONS |= {"abdomen": "abdomen", "pelvic": "pelvis", "pelvis": "pelvis"}


@dataclass(frozen=True)
class Label:
    """A label of detection.json and mask.txt.

    `german` is empty where our schema has the name. `zones`: the first and last zone in which it
    can be seen; empty = not known, never said to be absent. `other_names`: further names in
    answers.
    """

    name: str
    class_name: str = ""
    german: str = ""
    zones: tuple[str, str] | tuple[()] = ()
    other_names: tuple[str, ...] = ()

    @property
    def class_id(self) -> int:
        return id_of(self.class_name) if self.class_name else 0

    def display(self, language: str) -> str:
        """The name in template questions; English for a label without a German name."""
        if language == "de":
            return display(self.class_id, "de") if self.class_name else self.german or self.name
        return self.name.lower()

    def mention_forms(self) -> tuple[str, ...]:
        """The forms in which an English answer names this label, case aside."""
        side, _, rest = self.name.lower().partition(" ")
        sided = (f"{rest} {side}",) if side in ("left", "right") else ()
        return (self.name.lower(), *sided, *self.other_names)


def _both_sides(name: str, german: str, masculine: bool, zones, class_stem: str = ""):
    endings = {"Left": "linker" if masculine else "linke", "Right": ""}
    endings["Right"] = "rechter" if masculine else "rechte"
    for side, word in endings.items():
        class_name = f"{class_stem}_{side.lower()}" if class_stem else ""
        yield Label(f"{side} {name}", class_name, f"{word} {german}", zones)


_ALL = (
    Label("Brain Stem", "", "Hirnstamm", ("head", "head")),
    *_both_sides("Temporal Lobe", "Temporallappen", True, ("head", "head")),
    Label("Left Eye", "", "linkes Auge", ("head", "head")),
    Label("Right Eye", "", "rechtes Auge", ("head", "head")),
    Label("Left Ear", "", "linkes Ohr", ("head", "head")),
    Label("Right Ear", "", "rechtes Ohr", ("head", "head")),
    Label("Brain Edema", "", "Hirnödem", ("head", "head")),
    Label("Brain Enhancing Tumor", "", "anreichernder Hirntumor", ("head", "head")),
    Label("Brain Non-enhancing Tumor", "", "nicht anreichernder Hirntumor", ("head", "head")),
    *_both_sides("Mandible", "Unterkiefer", True, ("head", "neck")),
    *_both_sides("Parotid", "Ohrspeicheldrüse", False, ("head", "neck")),
    Label("Tooth", "", "Zahn", ("head", "neck")),
    Label("Larynx", "", "Kehlkopf", ("neck", "neck")),
    Label("Trachea", "trachea", "", ("neck", "chest")),
    Label("Esophagus", "esophagus", "", ("neck", "abdomen"), ("oesophagus",)),
    Label("Spinal Cord", "spinal_cord", "", ("head", "abdomen")),
    *_both_sides("Humerus Head", "Humeruskopf", True, ("neck", "chest")),
    *_both_sides("Lung", "Lunge", False, ("neck", "abdomen"), "lung"),
    Label("Heart", "heart", "", ("chest", "abdomen")),
    Label("Lung Cancer", "", "Lungenkrebs", ("neck", "abdomen")),
    Label("Liver", "liver", "", ("chest", "abdomen")),
    Label("Spleen", "spleen", "", ("chest", "abdomen")),
    Label("Stomach", "stomach", "", ("chest", "abdomen")),
    *_both_sides("Kidney", "Niere", False, ("chest", "pelvis"), "kidney"),
    Label("Duodenum", "duodenum", "", ("abdomen", "abdomen")),
    Label("Colon", "colon", "", ("chest", "pelvis"), ("large bowel",)),
    Label("Small Bowel", "small_bowel", "", ("abdomen", "pelvis")),
    Label("Liver Cancer", "", "Leberkrebs", ("chest", "abdomen")),
    Label("Kidney Cancer", "", "Nierenkrebs", ("abdomen", "pelvis")),
    Label("Bladder", "urinary_bladder", "", ("pelvis", "pelvis"), ("urinary bladder",)),
    Label("Rectum", "", "Rektum", ("pelvis", "pelvis")),
    *_both_sides("Femoral Head", "Femurkopf", True, ("pelvis", "pelvis")),
    # Findings of the chest X-rays: boxes without masks. What other regions have too has no zone.
    Label("Pneumonia", "", "Pneumonie", ("chest", "chest")),
    Label("Nodule", "", "Rundherd"),
    Label("Mass", "", "Raumforderung"),
    Label("Effusion", "", "Erguss"),
    Label("Infiltration", "", "Infiltrat"),
    Label("Atelectasis", "", "Atelektase", ("chest", "chest")),
    Label("Cardiomegaly", "", "Kardiomegalie", ("chest", "chest")),
    Label("Pneumothorax", "", "Pneumothorax", ("chest", "chest")),
)
LABELS: dict[str, Label] = {label.name: label for label in _ALL}
# The mask table's own slip.
ALIASES = {"Right Parotid2": "Right Parotid"}


def label_of(name: str) -> Label:
    """The label of this name; an unknown one has no class, no German name and no zone."""
    name = " ".join(name.split())
    return LABELS.get(ALIASES.get(name, name)) or Label(name)


def zone_of(location: str) -> str:
    """The zone of an image from SLAKE's location ("Brain_Tissue" → head); "" if not known."""
    first = location.replace("_", " ").lower().split()
    return _LOCATIONS.get(first[0], "") if first else ""


def surely_absent(label: Label, zone: str) -> bool:
    """Whether a label cannot be in a picture of this zone.

    SLAKE marks only some of what a picture shows (a liver data set has no spleens), so "not
    marked" does not mean absent. What lies further off than the neighbouring zone does.
    """
    if not zone or not label.zones:
        return False
    here = ZONES.index(zone)
    first, last = (ZONES.index(name) for name in label.zones)
    return here < first - 1 or here > last + 1
