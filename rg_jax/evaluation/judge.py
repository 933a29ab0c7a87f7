"""LLMScore: a language model grades each answer against its reference, by text alone.

The judge gives 1 (completely wrong) to 5 (completely right), which counts as (score − 1) / 4. An
answer for which it gives no score that can be read (garbage, out of range, a server that fails) is
asked again and then counted as failed: it is neither 0 nor left out without a word. As in the
paper, the judge sees no picture; prompt and examples are our own (`judge_prompt`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rg_jax.config import write_aside
from rg_jax.endpoint import Answer, Endpoint, Failure, Request
from rg_jax.errors import UserError
from rg_jax.evaluation import judge_prompt
from rg_jax.evaluation.bootstrap import RESAMPLES, bootstrap_means
from rg_jax.evaluation.figures import KINDS, QUESTIONS, kind_of, text_pairs
from rg_jax.evaluation.results import Result
from rg_jax.evaluation.score import GROUPS, rows_by
from rg_jax.grounding.prompts import WORDINGS

VERDICTS_FILE = "judge.jsonl"
LOWEST, HIGHEST = 1, 5
# The digit, then nothing but the reason: "5 mm lesion" is prose and no score.
_REPLY = re.compile(
    r"\s*(?P<score>[+-]?\d+(?:[.,]\d+)?)\s*[.:]?\s*(?:<reason>(?P<reason>.*?)(?:</reason>\s*)?)?\Z",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judge on one sample: a score from 1 to 5 with its reason, or None and why there is none.

    `failure` is a few words to count by.
    """

    score: int | None
    reason: str = ""
    failure: str = ""


def read_reply(text: str) -> Verdict:
    """The score and reason in a judge's reply; what it thought in <think> tags is passed over.

    Raises ValueError, with what is wrong in a few words, for a reply that does not begin with a
    whole number from 1 to 5 or goes on with anything but its reason.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text.rpartition("</think>")[2], flags=re.DOTALL)
    found = _REPLY.match(text)
    if found is None:
        raise ValueError("unparsable")
    score = float(found["score"].replace(",", "."))
    if not score.is_integer():
        raise ValueError("no whole number")
    if not LOWEST <= score <= HIGHEST:
        raise ValueError("score out of range")
    return Verdict(int(score), " ".join((found["reason"] or "").split()))


_WORDS = "|".join(re.escape(wording.prompts["vqa"]) for wording in WORDINGS.values())
_ANSWER = re.compile(rf"\s*(?:{_WORDS})\s*\Z")


def pair(result: Result, remover: str = "ours") -> tuple[str, str, str]:
    """Question, candidate and reference as the judge sees them.

    The question is the prompt without its closing "Answer:" ("Antwort:"); the two texts are those
    that the other text scores compare (`remover`: see `figures.REMOVERS`).
    """
    question = _ANSWER.sub("", result.sample.prefix).strip()
    candidate, reference = text_pairs([result], remover)[0]
    return question, candidate, reference


def judge(
    results: Sequence[Result],
    endpoint: Endpoint,
    progress: Callable[[int], object] | None = None,
    remover: str = "ours",
) -> dict[str, Verdict]:
    """Sample id → verdict, for all results. Raises UserError if the endpoint cannot be used.

    Equal pairs are asked once; with a cache the same call goes on where it was stopped, and asks
    again for what had failed. `progress(1)` is called after each sample.
    """
    requests = [
        Request(judge_prompt.messages(*pair(result, remover)), check=read_reply)
        for result in results
    ]
    answers = endpoint.ask_all(requests, progress)
    return {
        result.sample.id: answer.value
        if isinstance(answer, Answer)
        else Verdict(None, failure=_words(answer))
        for result, answer in zip(results, answers, strict=True)
    }


def _words(failure: Failure) -> str:
    return failure.detail if failure.kind == "refused answer" else failure.kind


def figures(
    results: Sequence[Result],
    verdicts: Mapping[str, Verdict],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`llm_score_<kind>` for each kind of answer that occurs, and `llm_score_questions` for open
    and closed ones together where there are both.

    Each is an interval over the samples that have a score, with `n_failed`: how many of the kind
    have none.
    """
    kinds = [kind_of(result) for result in results]
    scores = [verdicts[result.sample.id].score for result in results]
    values = np.array([np.nan if s is None else (s - 1) / 4 for s in scores], np.float64)
    columns = {kind: np.isin(kinds, kind) for kind in dict.fromkeys(KINDS.values())}
    if columns["open"].any() and columns["closed"].any():
        columns[QUESTIONS] = columns["open"] | columns["closed"]
    rows = {f"llm_score_{kind}": chosen for kind, chosen in columns.items() if chosen.any()}
    if not rows:
        return {}
    table = np.stack([np.where(chosen, values, np.nan) for chosen in rows.values()], axis=1)
    intervals = bootstrap_means(table, resamples, seed)
    return {
        name: {**interval, "n_failed": int(chosen.sum()) - interval["n"]}
        for (name, chosen), interval in zip(rows.items(), intervals, strict=True)
    }


def add_figures(
    metrics: Mapping[str, Any],
    results: Sequence[Result],
    verdicts: Mapping[str, Verdict],
    model: str,
) -> dict[str, Any]:
    """The content of `metrics.json` with the judge's figures, those of an earlier judge replaced.

    Top level and the groups (task, language, modality) get `llm_score_<kind>`, and `judge` says
    which model, by which prompt, and why samples have no score.
    """
    about = metrics["set"]
    settings = {"resamples": about["resamples"], "seed": about["seed"]}
    updated = _without_scores(metrics) | figures(results, verdicts, **settings)
    samples = [result.sample for result in results]
    for group, key in GROUPS.items():
        rows = rows_by(samples, key)
        updated[f"by_{group}"] = {
            value: _without_scores(found)
            | figures([results[k] for k in rows.get(value, ())], verdicts, **settings)
            for value, found in metrics.get(f"by_{group}", {}).items()
        }
    failures = Counter(v.failure for v in verdicts.values() if v.score is None)
    updated["judge"] = {
        "model": model,
        "prompt": judge_prompt.VERSION,
        "scored": len(verdicts) - failures.total(),
        "failed": dict(sorted(failures.items())),
    }
    return updated


def _without_scores(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not key.startswith("llm_score_")}


def write_verdicts(path: str | Path, verdicts: Mapping[str, Verdict]) -> None:
    """Write `judge.jsonl`, one sample a line in the order of ids, whole or not at all."""
    lines = [
        json.dumps({"id": name, **dataclasses.asdict(verdict)}, ensure_ascii=False)
        for name, verdict in sorted(verdicts.items())
    ]
    write_aside(path, "".join(line + "\n" for line in lines))


def read_verdicts(path: str | Path) -> dict[str, Verdict]:
    """Read `judge.jsonl` back; a missing file gives none. Raises UserError for a damaged line."""
    path = Path(path)
    if not path.exists():
        return {}
    verdicts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            name = row.pop("id")
            verdicts[name] = Verdict(**row)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path}, line {number} is no verdict; run the judge again") from None
    return verdicts
