"""JSON in the words of a language model: read leniently, checked strictly. Stdlib only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def read_json(content: str) -> Any:
    """The JSON object or list in a model's text; None if there is none, or only half of one.

    Thoughts in <think> tags and words or code fences around it are passed over. What counts begins
    at the first brace or bracket (of the first code fence, if there is one); if that does not end,
    it is half, and nothing inside it is taken instead.
    """
    text = re.sub(
        r"<think>.*?(</think>|\Z)", "", content.rpartition("</think>")[2], flags=re.DOTALL
    )
    fence = re.search(r"```(?:json)?\s*(?=[{\[])", text)
    start = re.compile(r"[{\[]").search(text, fence.end() if fence else 0)
    if start is None:
        return None
    try:
        return json.JSONDecoder().raw_decode(text, start.start())[0]
    except (ValueError, RecursionError):
        return None


_TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_KNOWN = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "minItems",
    "maxItems", "minLength", "minimum", "maximum", "description", "title",
}  # fmt: skip


def mismatch(value: Any, schema: Mapping[str, Any], where: str = "the answer") -> str:
    """Why `value` does not meet a JSON schema, "" if it does.

    Of JSON Schema it knows the keywords that chat endpoints accept in strict mode; another one is
    a ValueError, since it would silently check nothing.
    """
    if unknown := set(schema) - _KNOWN:
        raise ValueError(f"schema keywords {', '.join(sorted(unknown))} are not supported")
    if kinds := schema.get("type"):
        kinds = [kinds] if isinstance(kinds, str) else kinds
        fits = any(isinstance(value, _TYPES[kind]) for kind in kinds)
        if isinstance(value, bool) and "boolean" not in kinds:
            fits = False
        if not fits:
            return f"{where} is not of type {' or '.join(kinds)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where} is none of the allowed values"
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return f"{where} is too short"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{where} is out of range"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{where} has the wrong number of items"
        for item in value:
            if "items" in schema and (problem := mismatch(item, schema["items"], f"{where}[]")):
                return problem
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                return f"{where} lacks {name}"
        if schema.get("additionalProperties") is False and (extra := set(value) - set(known)):
            return f"{where} has an unknown field {min(extra)}"
        for name, part in known.items():
            if name in value and (problem := mismatch(value[name], part, f"{where}.{name}")):
                return problem
    return ""
