"""Stage c: questions and answers → a parquet with `dicom_vqa` and `snippet_vqa` filled.

    python -m tools.write_vqa --parquet=refrad2d_vqa_dataset.parquet --out=with_vqa.parquet \\
        [--dicom_dir=dicoms_anon] [--index=scans_index_ct.json,scans_index_mr.json] \\
        [--url=http://localhost:8000/v1 --model=NAME]

Per row and language three pairs from the slice's metadata (`dicom_vqa`), by rule, and worded anew
by the language model if one is given (tools/wordings.py); and five from the report sentence
(`snippet_vqa`), by the model alone. Plane and side are asked for only where --dicom_dir or --index
tells them. What a model writes of a sentence is checked pair by pair: type, choices that hold the
answer, yes/no answers of one word, no number that the sentence does not give, nothing that may
identify someone. One bad pair and the answer is asked for again; what stays bad is left empty and
counted by reason. Lists that are filled already stay, unless --replace.

Grounded questions ("Is the liver visible?") are no part of the file: the builders make them from
the masks by templates (rg_jax/grounding/prompts.py).
"""

import re
from pathlib import Path

from rg_jax.endpoint import Endpoint, Failure, Request
from rg_jax.errors import UserError
from rg_jax.grounding.cleaning import clean_text
from rg_jax.json_answers import mismatch
from tools import slice_questions, texts
from tools.slice_questions import YES_NO, Known, Pair
from tools.stages import Parser, Summary, command, progress, read_json, write_aside
from tools.wordings import Wordings

PER_CAPTION = 5
TYPES = ("open", "yesno", "multiple")
ROWS = 256  # of one step: asked for together, then written
INSTRUCTIONS = {
    "en": """You write questions and answers about a radiological image. You get one sentence of \
its report and see nothing else.

Write exactly five pairs that the sentence alone answers:
- two of type "open": a question whose answer is a few words;
- two of type "yesno": the answer is "Yes" or "No", one of each if the sentence allows it;
- one of type "multiple": three or four "choices", one of which is, word for word, the answer.

Rules:
- Ask about the image ("Is the liver enlarged?"), not about the report or the sentence.
- Every question ends in a question mark; no question twice.
- Nothing that the sentence does not say; no numbers of your own in answers.
- No names, dates, ages or numbers of persons or examinations.
- "choices" is null except for type "multiple".

Answer with JSON alone: {"pairs": [{"question": "...", "answer": "...", "type": "open", \
"choices": null}, ...]}""",
    "de": """Du schreibst Fragen und Antworten zu einem radiologischen Bild. Du bekommst einen \
Satz seines Befundes und siehst sonst nichts.

Schreibe genau fünf Paare auf Deutsch, die der Satz allein beantwortet:
- zwei vom Typ "open": eine Frage, deren Antwort wenige Wörter hat;
- zwei vom Typ "yesno": die Antwort ist "Ja" oder "Nein", je einmal, wenn der Satz es erlaubt;
- eines vom Typ "multiple": drei oder vier "choices", von denen eine Wort für Wort die Antwort ist.

Regeln:
- Frage nach dem Bild ("Ist die Leber vergrößert?"), nicht nach dem Befund oder dem Satz.
- Jede Frage endet mit einem Fragezeichen; keine Frage zweimal.
- Nichts, was der Satz nicht sagt; keine eigenen Zahlen in Antworten.
- Keine Namen, Daten, Alter oder Nummern von Personen oder Untersuchungen.
- "choices" ist null außer beim Typ "multiple".

Antworte nur mit JSON: {"pairs": [{"question": "...", "answer": "...", "type": "open", \
"choices": null}, ...]}""",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "question": {"type": "string"},
                    "answer": {"type": "string"},
                    "type": {"type": "string", "enum": list(TYPES)},
                    "choices": {"type": ["array", "null"], "items": {"type": "string"}},
                },
                "required": ["question", "answer", "type", "choices"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
# Dates, long numbers, addresses, persons. No report sentence should hold them; a model may.
IDENTIFYING = re.compile(
    r"\b\d{1,2}\.\s?\d{1,2}\.\s?(?:19|20)?\d{2}\b|\b\d{4}-\d{2}-\d{2}\b|\b\d{1,2}/\d{1,2}/\d{2,4}\b"
    r"|\b(?:19|20)\d{2}\b|\d{6,}|[\w.]+@[\w.]+|\b(?i:tel|fon|phone)\b"
    r"|\b(?:[Dd]r|[Pp]rof|Mr|Mrs|Ms|Herrn?|Frau)\b\.?\s+[A-ZÄÖÜ][a-zäöü]"
    r"|\b(?i:born|geboren|geb)\b"
    r"|\b\d{1,3}[ -](?i:years?[ -]old|jährig\w*|jahre\s+alt)"
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)?")


def request(caption: str, language: str) -> Request:
    messages = [
        {"role": "system", "content": INSTRUCTIONS[language]},
        {"role": "user", "content": caption},
    ]
    return Request(messages, SCHEMA, lambda value: checked(value, caption, language))


def checked(value: object, caption: str, language: str) -> list[Pair]:
    """The pairs of an answer in the form of the parquet. ValueError with a reason to count by."""
    if mismatch(value, SCHEMA):
        raise ValueError("not the form asked for")
    pairs = value["pairs"]  # type: ignore[index]
    if len(pairs) != PER_CAPTION:
        raise ValueError("not five pairs")
    made = [_checked_pair(pair, caption, language) for pair in pairs]
    if len({str(pair["question"]).casefold() for pair in made}) < len(made):
        raise ValueError("a question twice")
    if {pair["question_type"] for pair in made} != set(TYPES):
        raise ValueError("a type of question is missing")
    return made


def _checked_pair(pair: dict, caption: str, language: str) -> Pair:
    question, answer = (" ".join(pair[field].split()) for field in ("question", "answer"))
    kind = pair["type"]
    choices = [" ".join(choice.split()) for choice in pair["choices"] or ()]
    if not question or not answer:
        raise ValueError("empty question or answer")
    if not question.endswith("?"):
        raise ValueError("no question mark")
    if any(IDENTIFYING.search(text) for text in (question, answer, *choices)):
        raise ValueError("identifying text")
    if kind == "yesno":
        answer = answer.rstrip(".!").capitalize()
        if answer not in YES_NO[language]:
            raise ValueError("yes/no question with another answer")
    elif not _numbers(answer) <= _numbers(caption):
        raise ValueError("number that the caption does not give")
    if kind != "multiple" and choices:
        raise ValueError("choices where there are none")
    if kind == "multiple":
        if not 2 <= len(choices) <= 6 or len({c.casefold() for c in choices}) < len(choices):
            raise ValueError("choices too few, too many or twice")
        if not all(choices) or answer not in choices:
            raise ValueError("choices without the answer")
    return {
        "question": question,
        "answer": answer,
        "question_type": kind,
        "choices": choices if kind == "multiple" else None,
    }


def _numbers(text: str) -> set[str]:
    return {number.replace(",", ".") for number in _NUMBER.findall(text)}


class Places:
    """Plane and side of slices, from the index of slices or from their DICOM headers."""

    def __init__(self, index: str, dicom_dir: str, summary: Summary):
        self.summary = summary
        self.dicom_dir = Path(dicom_dir) if dicom_dir else None
        if self.dicom_dir and not self.dicom_dir.is_dir():
            raise UserError(f"--dicom_dir={dicom_dir}: no such folder")
        if self.dicom_dir:
            try:  # once here: below, a slice that cannot be read is counted, not refused
                import pydicom  # noqa: F401
                import zstandard  # noqa: F401
            except ImportError as error:
                raise UserError(
                    f'--dicom_dir needs {error.name}: pip install -e ".[data]"'
                ) from error
        self.planes: dict[str, str] = {}
        for path in filter(None, index.split(",")):
            scans = read_json(path)
            try:
                for scan in scans.values():
                    for name, place in scan["slices"].items():
                        axis = ("sagittal", "coronal", "axial")[place["slice_axis"]]
                        self.planes[name] = axis
            except (AttributeError, KeyError, TypeError, IndexError) as error:
                raise UserError(
                    f"--index={path}: must be {{scan: {{slices: {{id: {{slice_axis}}}}}}}}"
                ) from error

    def of(self, name: str) -> tuple[str, str]:
        """(plane, side of the patient's left in the image), each "" if it is not known."""
        if plane := self.planes.get(name, ""):
            # Slices out of volumes lie as spec'd: x rises along the rows, unless it is the axis.
            return plane, "" if plane == "sagittal" else "right"
        if self.dicom_dir is None:
            return "", ""
        from rg_jax.data.dicom import read_slice

        path = self.dicom_dir / name[:2] / f"{name}.dcm.zst"
        path = path if path.exists() else path.with_suffix("")
        try:
            return slice_questions.place_of(read_slice(path).orientation)
        except (UserError, OSError):
            self.summary.note("plane not known, DICOM missing or unreadable", name)
            return "", ""


def known(row: dict, name: str, places: Places, summary: Summary) -> Known:
    modality, part = (str(row.get(field) or "") for field in ("modality", "body_part"))
    if modality not in slice_questions.MODALITIES["en"]:
        summary.note(f"modality not asked for: {modality or 'empty'}", name)
        modality = ""
    if not (found := slice_questions.known_part(part)):
        summary.note(f"body part not asked for: {part or 'empty'}", name)
    return Known(modality, found, *places.of(name))


def filled_type(struct):
    """A language's struct type with both lists of pairs, in the form of the RefRad2D parquet."""
    import pyarrow as pa

    text = pa.string()
    pair = pa.struct(
        [
            ("question", text),
            ("answer", text),
            ("question_type", text),
            ("choices", pa.list_(pa.field("element", text))),
        ]
    )
    fields = [field for field in struct if field.name not in ("dicom_vqa", "snippet_vqa")]
    lists = [
        pa.field(name, pa.list_(pa.field("element", pair))) for name in ("dicom_vqa", "snippet_vqa")
    ]
    return pa.struct([*fields, *lists])


def id_column(schema, path: str) -> str:
    """The column of the ids: `rsopid`, or the pandas index. UserError if there is neither."""
    names = set(schema.names)
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    for name in ("rsopid", *(column for column in index if isinstance(column, str))):
        if name in names:
            return name
    raise UserError(f"--parquet={path}: has no column rsopid and no index of ids")


def write(options, endpoint: Endpoint | None, languages: list[str]) -> list[Summary]:
    """The whole stage: read, ask, write aside, rename."""
    import pyarrow as pa

    file = texts.open_parquet(options.parquet)
    schema = file.schema_arrow
    ids = id_column(schema, options.parquet)
    target = schema
    for language in languages:
        field = texts.language_field(schema, language, options.parquet)
        position = schema.get_field_index(field.name)
        target = target.set(position, field.with_type(filled_type(field.type)))
    slices = Summary("questions on the slice")
    findings = Summary("questions on the findings (captions)")
    places = Places(options.index, options.dicom_dir, slices)
    wordings = Wordings(endpoint, options.wordings, IDENTIFYING, slices)
    total = min(file.metadata.num_rows, options.limit or file.metadata.num_rows)
    left = total
    with (
        write_aside(options.out) as aside,
        texts.parquet_module().ParquetWriter(aside, target) as writer,
        progress((), "vqa", unit="caption", total=total * len(languages)) as bar,
    ):
        for batch in file.iter_batches(batch_size=ROWS):
            if not left:
                break
            batch = batch.slice(0, left)
            left -= batch.num_rows
            rows = batch.to_pylist()
            from_slices(rows, ids, languages, options, places, wordings, slices)
            from_findings(rows, ids, languages, options, endpoint, findings, bar.update)
            for language in languages:
                column = target.field(texts.COLUMN[language])
                values = pa.array([row[column.name] for row in rows], type=column.type)
                position = batch.schema.get_field_index(column.name)
                batch = batch.set_column(position, column, values)
            writer.write_batch(pa.RecordBatch.from_arrays(batch.columns, schema=target))
    return [slices, findings]


def _texts(row: dict, language: str) -> dict | None:
    """A row's struct of a language (None if the row has none)."""
    return row[texts.COLUMN[language]]


def from_slices(
    rows, ids, languages, options, places: Places, wordings: Wordings, summary: Summary
) -> None:
    made: list[tuple[dict, str, str, list[tuple[str, Pair]]]] = []
    for row in rows:
        name = str(row[ids])
        todo = []
        for language in languages:
            told = _texts(row, language)
            if told is None:
                continue
            if there := len(told.get("dicom_vqa") or ()) * (not options.replace):
                summary.keep("pairs that were there", there)
            else:
                todo.append(language)
        if not todo:
            continue
        seed = texts.draw(options.seed, name)
        facts = known(row, name, places, summary)
        subjects = [fact for fact, _, _ in slice_questions.plan(facts, seed)]
        pairs = slice_questions.questions(facts, seed)
        for language in todo:
            asked = list(zip(subjects, pairs[language], strict=True))
            made.append((_texts(row, language), name, language, asked))
            if lack := slice_questions.PER_SLICE - len(asked):
                summary.leave_out("too little known of the slice", name, lack)
    wordings.learn((language, *one) for _, _, language, asked in made for one in asked)
    for told, name, language, asked in made:
        told["dicom_vqa"] = []
        for number, (_, pair) in enumerate(asked):
            drawn = wordings.of(language, pair, texts.draw(options.seed, name, language, number))
            told["dicom_vqa"].append(drawn)
            by_rule = drawn["question"] == pair["question"]
            summary.keep("pairs by rule" if by_rule else "pairs by rule, worded by the model")


def from_findings(
    rows, ids, languages, options, endpoint: Endpoint | None, summary: Summary, update
) -> None:
    wanted: list[tuple[dict, str, str]] = []
    for row in rows:
        for language in languages:
            told = _texts(row, language)
            if told is None:
                continue
            if told.get("snippet_vqa") and not (options.replace and endpoint):
                summary.keep("captions whose pairs were there")
                continue
            told["snippet_vqa"] = []
            caption = clean_text(told["CleanedSentence"] or "")
            if not caption:
                summary.leave_out("empty caption", row[ids])
            elif endpoint is None:
                summary.leave_out("no endpoint (--url)", row[ids])
            else:
                wanted.append((told, caption, language))
    update(len(rows) * len(languages) - len(wanted))
    if endpoint is None:
        return
    requests = [request(caption, language) for _, caption, language in wanted]
    answers = endpoint.ask_all(requests, update)
    for (told, caption, _), answer in zip(wanted, answers, strict=True):
        if isinstance(answer, Failure):
            summary.fail(texts.reason_of(answer), texts.token_of(caption))
        else:
            told["snippet_vqa"] = answer.value
            summary.keep("captions with five pairs by the model")


def parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.write_vqa")
    parser.add_argument("--parquet", required=True, help="slices and reports in the RefRad2D form")
    parser.add_argument("--out", required=True, help="the parquet to write")
    parser.add_argument("--language", default="en,de", help="(default: en,de)")
    parser.add_argument("--dicom_dir", default="", help="slices: plane and side from their headers")
    parser.add_argument("--index", default="", help="scans_index_*.json: planes from there")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of metadata questions")
    parser.add_argument("--replace", action="store_true", help="write filled lists anew")
    parser.add_argument(
        "--wordings",
        type=int,
        default=8,
        help="other wordings of each metadata question to ask a model for (default: 8; 0: none)",
    )
    texts.add_endpoint_flags(parser)
    return parser


def run(options) -> list[Summary]:
    languages = texts.languages_of(options.language)
    if options.wordings < 0:
        raise UserError(f"--wordings={options.wordings}: must be 0 or more")
    out = Path(options.out)
    if out.is_dir() or out.suffix != ".parquet":
        raise UserError(f"--out={options.out}: must be the path of a .parquet file")
    out.parent.mkdir(parents=True, exist_ok=True)
    texts.remove_leftovers(out.parent)
    endpoint = texts.endpoint_of(options, out.parent)
    summaries = write(options, endpoint, languages)
    return summaries + ([texts.tries(endpoint)] if endpoint else [])


if __name__ == "__main__":
    command(run, parser())
