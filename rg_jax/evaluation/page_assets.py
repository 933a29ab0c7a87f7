"""The report page's style sheet and its script, which are written into the page itself."""

from importlib import resources

_FOLDER = resources.files(__package__).joinpath("assets")

STYLE = _FOLDER.joinpath("page.css").read_text(encoding="utf-8")
# Without scripts the page shows every card, worst first, with the picture as it was drawn.
SCRIPT = _FOLDER.joinpath("page.js").read_text(encoding="utf-8")
