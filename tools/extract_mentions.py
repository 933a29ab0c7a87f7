"""Stage b: report sentences → keywords_{language}.json {sentence: {mention: class name}}.

    python -m tools.extract_mentions --parquet=refrad2d_vqa_dataset.parquet --out=DIR
    python -m tools.extract_mentions --sentences=list.json --language=en --out=DIR \\
        --url=http://localhost:8000/v1 --model=NAME

Without --url an offline dictionary finds the mentions (rg_jax/grounding/dictionary.py). With --url
a language model is asked, one sentence at a time, and what it says is checked: a mention has to
stand in the sentence on word boundaries, its class has to be one of the schema and must not
contradict the mention or the sides that the sentence names. What does not pass is counted by
reason. A sentence for which no usable answer came is left out of the file, never written as one
without mentions; run the command again and only those are asked again.
"""

import functools
import re
from collections.abc import Iterable
from pathlib import Path

from rg_jax.endpoint import Answer, Endpoint, Failure, Request
from rg_jax.errors import UserError
from rg_jax.grounding import anatomy, dictionary
from rg_jax.grounding.cleaning import clean_text
from rg_jax.grounding.contradictions import SIDE_WORDS, contradiction, side_of
from rg_jax.grounding.spans import has_marks
from tools import texts
from tools.stages import Parser, Summary, command, progress, read_json, write_json

INSTRUCTIONS = {
    "en": """You mark anatomical structures in sentences of radiology reports.

Find every place in the sentence that names one of the structures of the list below. For each give
- "mention": the words exactly as they stand in the sentence (same spelling, same inflection, no
  words added or left out), with the side if there is one ("left kidney", "T12 vertebra"), without
  articles and without the finding;
- "class": the name of the structure, exactly as in the list.

Rules:
- Paired organs count only with their side: "the kidney" or "both kidneys" is no mention.
- Parts of a structure count as it if the list has no entry of their own ("pancreatic head" is
  pancreas, "liver segment VII" is liver).
- A structure that is said to be normal, absent or not visible is a mention like any other.
- Words that only contain its name are no mention ("liver enzymes", "hepatic"); an adjective with a
  finding in the structure is one ("hepatic cyst", "left renal mass").
- No mention is a right answer too: then the list is empty.

Answer with JSON alone: {{"mentions": [{{"mention": "...", "class": "..."}}]}}

Structures: {classes}""",
    "de": """Du markierst anatomische Strukturen in Sätzen radiologischer Befunde.

Finde jede Stelle des Satzes, die eine Struktur der Liste unten benennt. Gib für jede an
- "mention": die Wörter genau so, wie sie im Satz stehen (gleiche Schreibung, gleiche Beugung,
  nichts ergänzt oder ausgelassen), mit der Seite, falls genannt ("linken Niere", "BWK 12"), ohne
  Artikel und ohne den Befund;
- "class": den Namen der Struktur, genau wie in der Liste (die Namen sind englisch).

Regeln:
- Paarige Organe zählen nur mit ihrer Seite: "die Niere" oder "beide Nieren" ist keine Erwähnung.
- Teile einer Struktur zählen als diese, wenn sie keinen eigenen Eintrag haben ("Pankreaskopf" ist
  pancreas, "Lebersegment VII" ist liver).
- Eine Struktur, die normal, fehlend oder nicht sichtbar genannt wird, ist eine Erwähnung wie jede.
- Wörter, die den Namen nur enthalten, sind keine Erwähnung ("Leberwerte", "hepatisch"); ein Wort
  aus einer Struktur und einem Befund in ihr ist eine ("Leberzyste", "Nierentumor links").
- Keine Erwähnung ist auch eine richtige Antwort: dann ist die Liste leer.

Antworte nur mit JSON: {{"mentions": [{{"mention": "...", "class": "..."}}]}}

Strukturen: {classes}""",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "mentions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "mention": {"type": "string"},
                    "class": {"type": "string", "enum": [c.name for c in anatomy.CLASSES]},
                },
                "required": ["mention", "class"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["mentions"],
    "additionalProperties": False,
}


@functools.cache
def instructions(language: str) -> str:
    """The system prompt of a language, with the names of all classes."""
    return INSTRUCTIONS[language].format(classes=", ".join(c.name for c in anatomy.CLASSES))


def request(caption: str, language: str) -> Request:
    messages = [
        {"role": "system", "content": instructions(language)},
        {"role": "user", "content": caption},
    ]
    check = functools.partial(check_answer, caption=caption, language=language)
    return Request(messages, SCHEMA, check)


def check_answer(value: object, caption: str, language: str) -> list[dict[str, str]]:
    """The mentions of an answer of the right form; they are counted one by one later.

    ValueError for another form, and where none of several mentions can be used: that is no
    sentence without mentions, but an answer to be asked for again.
    """
    mentions = value.get("mentions") if isinstance(value, dict) else None
    if not isinstance(mentions, list):
        raise ValueError("not the form asked for")
    for one in mentions:
        if not isinstance(one, dict) or not all(
            isinstance(one.get(field), str) for field in ("mention", "class")
        ):
            raise ValueError("not the form asked for")
    if mentions and not any(
        judge(caption, one["mention"], one["class"], language)[0] for one in mentions
    ):
        raise ValueError("none of its mentions can be used")
    return mentions


def judge(caption: str, mention: str, name: str, language: str) -> tuple[str, str]:
    """(mention as it stands in the caption, "") or ("", the reason for which it is refused)."""
    mention = mention.strip()
    if not mention:
        return "", "empty mention"
    try:
        anatomy.id_of(name)
    except ValueError:
        return "", "class not in the schema"
    if has_marks(mention):
        return "", "mention holds a grounding mark"
    words = re.escape(mention)
    stands = re.search(rf"(?<!\w){words}(?!\w)", caption) or re.search(
        rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE
    )
    if stands is None:
        inside = mention.casefold() in caption.casefold()
        return "", "mention only inside another word" if inside else "mention not in the caption"
    mention = stands.group()
    if reason := contradiction(mention, name, language):
        return "", reason
    side = side_of(name)
    if side and not re.search(SIDE_WORDS[language][side], caption, re.IGNORECASE):
        return "", "side not in the caption"
    return mention, ""


def by_dictionary(caption: str, language: str, found: Summary) -> dict[str, str]:
    for one in dictionary.find(caption, language, both=True):
        if len(one.classes) > 1:
            where = f"{one.text!r} in {texts.token_of(caption)}"
            found.leave_out("both sides at once (no single class)", where)
    mentions = dictionary.mentions(caption, language)
    found.keep("by the dictionary", len(mentions))
    return mentions


def from_answer(
    caption: str, answer: list[dict[str, str]], language: str, found: Summary
) -> dict[str, str]:
    mentions: dict[str, str] = {}
    known: dict[str, str] = {}
    for one in answer:
        mention, reason = judge(caption, one["mention"], one["class"], language)
        if not reason and mention.casefold() in known:
            same = known[mention.casefold()] == one["class"]
            reason = "given twice" if same else "given twice with two classes"
        if reason:
            found.leave_out(reason, texts.token_of(caption))
            continue
        known[mention.casefold()] = mentions[mention] = one["class"]
        found.keep("by the model")
    return mentions


def extract(
    sentences: Iterable[str], language: str, endpoint: Endpoint | None
) -> tuple[dict[str, dict[str, str]], list[Summary]]:
    """{sentence: {mention: class name}} in the order of the sentences, and what became of them.

    Sentences without a usable answer are not in it.
    """
    done = Summary(f"captions ({language})")
    found = Summary(f"mentions ({language})")
    unique = dict.fromkeys(sentence for sentence in sentences if sentence.strip())
    result: dict[str, dict[str, str]] = {}
    with progress((), f"mentions {language}", unit="caption", total=len(unique)) as bar:
        for part in texts.chunks(unique):
            # As the builders will see them, so that mentions stand there too.
            cleaned = [clean_text(sentence) for sentence in part]
            if endpoint is None:
                answers = [None] * len(part)
            else:
                requests = [request(caption, language) for caption in cleaned]
                answers = endpoint.ask_all(requests, bar.update)
            for sentence, caption, answer in zip(part, cleaned, answers, strict=True):
                if isinstance(answer, Failure):
                    done.fail(texts.reason_of(answer), texts.token_of(sentence))
                    continue
                if isinstance(answer, Answer):
                    mentions = from_answer(caption, answer.value, language, found)
                else:
                    mentions = by_dictionary(caption, language, found)
                    bar.update()
                done.keep("with mentions" if mentions else "without a mention")
                result[sentence] = mentions
    return result, [done, found]


def compare(ours: dict[str, dict[str, str]], reference: dict[str, dict[str, str]]) -> list[str]:
    """Precision and recall of (sentence, mention, class) over the sentences of both, as lines."""
    shared = [sentence for sentence in reference if sentence in ours]
    got = {(s, m, c) for s in shared for m, c in ours[s].items()}
    wanted = {(s, m, c) for s in shared for m, c in reference[s].items()}
    right = len(got & wanted)
    lines = [
        f"compared on {len(shared)} of {len(reference)} sentences:"
        f" precision {right / max(len(got), 1):.4f} ({right} of {len(got)}),"
        f" recall {right / max(len(wanted), 1):.4f} ({right} of {len(wanted)})"
    ]
    for sign, ones in (("+", got - wanted), ("-", wanted - got)):
        # Sentences are patients' texts: a terminal's log is told which one, not what it says.
        lines += [
            f"  {sign} {mention!r} as {name} in {texts.token_of(s)}"
            for s, mention, name in sorted(ones)
        ]
    return lines


def read_sentences(path: str) -> list[str]:
    value = read_json(path)
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise UserError(f"--sentences={path}: must be a JSON list of sentences")
    return value


def read_reference(path: str, language: str) -> dict[str, dict[str, str]]:
    file = Path(path.replace("{language}", language))
    if file.is_dir():
        file = file / f"keywords_{language}.json"
    value = read_json(file)
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise UserError(f"{file}: must be of the form {{sentence: {{mention: class name}}}}")
    return value


def parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.extract_mentions")
    parser.add_argument("--parquet", default="", help="captions in the RefRad2D form")
    parser.add_argument("--sentences", default="", help="or captions as a JSON list")
    parser.add_argument("--language", default="en,de", help="of the captions (default: en,de)")
    parser.add_argument("--out", required=True, help="folder of keywords_{language}.json")
    parser.add_argument(
        "--compare",
        default="",
        help="print precision and recall against this keywords file (may hold {language}, or be"
        " the folder of both)",
    )
    texts.add_endpoint_flags(parser)
    return parser


def run(options) -> list[Summary]:
    languages = texts.languages_of(options.language)
    if bool(options.parquet) == bool(options.sentences):
        raise UserError("say where the captions are: either --parquet or --sentences")
    if options.sentences and len(languages) != 1:
        raise UserError("--sentences are of one language: --language=en or --language=de")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    texts.remove_leftovers(out)
    endpoint = texts.endpoint_of(options, out)
    summaries = []
    for language in languages:
        if options.sentences:
            sentences = read_sentences(options.sentences)
            sentences = sentences[: options.limit or None]
        else:
            sentences = texts.captions(options.parquet, language, options.limit)
        result, told = extract(sentences, language, endpoint)
        write_json(out / f"keywords_{language}.json", result)
        summaries += told
        if options.compare:
            print("\n".join(compare(result, read_reference(options.compare, language))))
    if endpoint is not None:
        summaries.append(texts.tries(endpoint))
    return summaries


if __name__ == "__main__":
    command(run, parser())
