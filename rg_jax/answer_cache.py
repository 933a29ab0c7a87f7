"""Answers of a language model on disk, one file each. Standard library only."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class AnswerCache:
    """Texts by key in a folder; without a folder it keeps nothing.

    Each file is written aside and renamed, so that it is whole or not there, whatever kills the
    process; several processes may share a folder. The question is kept beside the answer for people
    who look into it.
    """

    def __init__(self, folder: str | os.PathLike | None):
        self.folder = Path(folder) if folder else None

    def _place(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.json"  # no folder of a million files

    def get(self, key: str) -> str | None:
        """The text under `key`; None if it is not there or its file is damaged."""
        if self.folder is None:
            return None
        try:
            content = json.loads(self._place(key).read_text(encoding="utf-8"))["content"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return content if isinstance(content, str) else None

    def put(self, key: str, content: str, question: Mapping[str, Any]) -> None:
        """Keep a text. Raises OSError if the disk does not take it."""
        if self.folder is None:
            return
        place = self._place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=place.parent, prefix=".aside-", suffix=".json")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"question": question, "content": content}, file, ensure_ascii=False)
            os.replace(aside, place)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
