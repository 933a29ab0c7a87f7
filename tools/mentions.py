"""The mentions of stage b: which of them stand for a place on a slice."""

from pathlib import Path
from typing import Any

from rg_jax.errors import UserError
from rg_jax.grounding.anatomy import id_of
from rg_jax.grounding.cleaning import clean_text
from rg_jax.grounding.contradictions import contradiction
from rg_jax.grounding.spans import find_mentions
from tools.stages import read_json

LANGUAGES = ("en", "de")


class Mentions:
    """keywords_{en,de}.json of a folder: {sentence: {mention: class name}} by language.

    A language without a file has no mentions. UserError if there is no file at all, or a damaged
    one.
    """

    def __init__(self, folder: Path):
        self._sentences: dict[str, dict[str, dict[str, str]]] = {}
        for language in LANGUAGES:
            path = folder / f"keywords_{language}.json"
            if not path.is_file():
                continue
            content = read_json(path)
            if not isinstance(content, dict) or not all(
                isinstance(mentions, dict) for mentions in content.values()
            ):
                raise UserError(f"{path}: is not {{sentence: {{mention: class name}}}}")
            # The extractor may have read the sentence before or after cleaning.
            cleaned = {clean_text(text): mentions for text, mentions in content.items()}
            self._sentences[language] = cleaned | content
        if not self._sentences:
            raise UserError(f"{folder}: no keywords_en.json or keywords_de.json; run stage b first")

    def of(self, language: str, sentence: str) -> dict[str, str] | None:
        """{mention: class name} of a sentence, as it stands or cleaned.

        None if the file does not list it: stage b has no answer for it, which is not the same as
        a sentence that names nothing.
        """
        sentences = self._sentences.get(language)
        if sentences is None or not sentence.strip():
            return {}
        listed = [s for s in (sentence, clean_text(sentence)) if s in sentences]
        return next((sentences[s] for s in listed if sentences[s]), {} if listed else None)


def kept_mentions(
    text: str, mentions: dict[str, str], present: set[int], notes: list[str], language: str
) -> list[list[Any]]:
    """[[mention, class name, id]] of the mentions that stand in the text and have a place."""
    kept = []
    for mention, name in mentions.items():
        try:
            class_id = id_of(name)
        except ValueError:
            notes.append("mention of an unknown class dropped")
            continue
        if reason := contradiction(mention, name, language):
            notes.append(f"{reason}: dropped")
        elif class_id not in present:
            notes.append("mention without a place dropped")
        elif not any(
            find_mentions(form, [(mention, class_id)], present, ignore_case=True)
            for form in (clean_text(text), text)
        ):
            notes.append("mention that is not in its sentence dropped")
        else:
            kept.append([mention, name, class_id])
    return kept
