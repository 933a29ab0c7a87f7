"""Is a judge worth listening to? Its scores against those of people, from a CSV.

    python -m tools.validate_judge ratings.csv --raters=anna,ben,carl --judge=llm --out=FOLDER

The CSV has a line per item: an id (`--item`, default the first column), one column of scores per
person, one of the judge. An empty cell is a missing score. Gives the ordinal Krippendorff α among
the raters, Pearson's r of the judge against the mean rater (and against each), α with the judge as
one more rater, each with a 95 % bootstrap interval over items, in FOLDER/agreement.json, and a
picture of both in FOLDER/agreement.svg. The judge's own scores of an evaluation are in its
judge.jsonl.
"""

import csv
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rg_jax.errors import UserError
from rg_jax.evaluation.agreement import ordinal_alpha, pearson
from rg_jax.evaluation.bootstrap import RESAMPLES, intervals
from rg_jax.evaluation.charts import scatter_chart, standalone
from tools.stages import Parser, Summary, command, write_bytes, write_json


class Ratings(NamedTuple):
    """The table: item ids, names of raters, ratings (items, raters), the judge's scores (items,).

    NaN is a missing score.
    """

    items: list[str]
    raters: list[str]
    ratings: np.ndarray
    judge: np.ndarray


def read_ratings(path: Path, item: str, raters: list[str], judge: str) -> Ratings:
    """Read the CSV (commas, semicolons or tabs). `raters` empty: all other columns.

    Raises UserError naming line and column of what cannot be read.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            # Spreadsheets in half of Europe write semicolons.
            delimiter = max(",;\t", key=first.count)
            rows = list(csv.reader(file, delimiter=delimiter, strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV ({error})") from None
    if len(rows) < 2:
        raise UserError(f"{path}: needs a line of column names and one line per item")
    heads = [name.strip() for name in rows[0]]
    if twice := sorted({name for name in heads if heads.count(name) > 1}):
        raise UserError(f"{path}: has the column {twice[0]!r} twice")
    item = item or heads[0]
    for name in (item, judge, *raters):
        if name not in heads:
            raise UserError(f"{path}: has no column {name!r}; there are {', '.join(heads)}")
    raters = raters or [name for name in heads if name not in (item, judge)]
    if not raters:
        raise UserError(f"{path}: has no column of a human rater")
    if len({item, judge, *raters}) < 2 + len(raters):
        raise UserError("--item, --judge and --raters must be different columns")
    columns = [heads.index(name) for name in (*raters, judge)]
    ids, table = [], []
    for number, row in enumerate(rows[1:], 2):
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(heads):
            raise UserError(f"{path}, line {number}: has {len(row)} cells, not {len(heads)}")
        ids.append(row[heads.index(item)].strip())
        table.append([_score(row[c], f"{path}, line {number}, {heads[c]}") for c in columns])
    seen = set()
    for name in ids:
        if name in seen:
            raise UserError(f"{path}: has the item {name!r} twice")
        seen.add(name)
    values = np.array(table, np.float64).reshape(len(ids), len(columns))
    return Ratings(ids, raters, values[:, :-1], values[:, -1])


def _score(cell: str, where: str) -> float:
    text = cell.strip().replace(",", ".")
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {cell.strip()!r} is no number; leave a missing score empty")
    return value


def agreement(table: Ratings, resamples: int, seed: int) -> dict:
    """Every figure with its interval over items, as JSON."""
    _, raters, ratings, judge = table
    mean = mean_rating(ratings)
    statistics = {
        "alpha_raters": ordinal_alpha(ratings),
        "alpha_raters_and_judge": ordinal_alpha(np.column_stack([ratings, judge])),
        "pearson_judge_mean_rater": pearson(judge, mean),
    }
    single = {name: pearson(judge, ratings[:, k]) for k, name in enumerate(raters)}
    both = ~np.isnan(judge) & ~np.isnan(mean)
    return {
        **intervals(statistics, resamples, seed),
        "pearson_judge_rater": intervals(single, resamples, seed),
        "mean_judge_minus_rater": float((judge - mean)[both].mean()) if both.any() else None,
        "items": len(ratings),
        "items_without_rating": int(np.isnan(mean).sum()),
        "items_without_judge": int(np.isnan(judge).sum()),
        "ratings_missing": int(np.isnan(ratings).sum()),
        "raters": raters,
        "resamples": resamples,
        "seed": seed,
    }


def mean_rating(ratings: np.ndarray) -> np.ndarray:
    """The mean of the ratings that an item has; NaN where it has none."""
    there = ~np.isnan(ratings)
    count = there.sum(1)
    sums = np.where(there, ratings, 0.0).sum(1)
    return np.divide(sums, count, out=np.full(len(ratings), np.nan), where=count > 0)


def plot(table: Ratings, found: dict) -> str:
    """The judge against the mean rater as the text of an SVG file, with r above."""
    title = f"r = {_words(found['pearson_judge_mean_rater'])}"
    points = list(zip(mean_rating(table.ratings), table.judge, strict=True))
    return standalone(scatter_chart(title, points, "mean rater", "judge"))


def _words(figure: dict) -> str:
    if not figure["n"]:
        return "not defined"
    return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def run(options) -> Summary:
    """The command."""
    if options.resamples < 1:
        raise UserError(f"--resamples={options.resamples}: must be at least 1")
    path, out = Path(options.csv), Path(options.out)
    raters = [name.strip() for name in options.raters.split(",") if name.strip()]
    table = read_ratings(path, options.item, raters, options.judge)
    if options.limit:
        table = Ratings(
            table.items[: options.limit],
            table.raters,
            table.ratings[: options.limit],
            table.judge[: options.limit],
        )
    found = agreement(table, options.resamples, options.seed)
    if not found["pearson_judge_mean_rater"]["n"]:
        raise UserError(f"{path}: the scores of judge or raters do not vary: nothing to compare")
    write_json(out / "agreement.json", found)
    write_bytes(out / "agreement.svg", plot(table, found).encode())
    print(f"ordinal α among {len(table.raters)} raters: {_words(found['alpha_raters'])}")
    print(f"… with the judge as one more: {_words(found['alpha_raters_and_judge'])}")
    print(f"r of judge and mean rater: {_words(found['pearson_judge_mean_rater'])}")
    for name, figure in found["pearson_judge_rater"].items():
        print(f"  and {name}: {_words(figure)}")
    summary = Summary("items")
    for name, score, mean in zip(table.items, table.judge, mean_rating(table.ratings), strict=True):
        if math.isnan(mean):
            summary.leave_out("no rater has a score", name)
        elif math.isnan(score):
            summary.leave_out("the judge has no score", name)
        else:
            summary.keep("with scores of judge and raters")
    summary.note("missing ratings", count=found["ratings_missing"])
    return summary


def parser() -> Parser:
    made = Parser(__doc__)
    made.add_argument("csv", help="the table of scores")
    made.add_argument("--raters", default="", help="columns of people (default: all others)")
    made.add_argument("--judge", default="judge", help="column of the judge (default: judge)")
    made.add_argument("--item", default="", help="column of item ids (default: the first)")
    made.add_argument("--out", default=".", help="folder of agreement.json and agreement.svg")
    made.add_argument("--resamples", type=int, default=RESAMPLES, help="of the bootstrap")
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    return made


if __name__ == "__main__":
    command(run, parser())
