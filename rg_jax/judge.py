"""LLMScore: a language model of yours grades the answers of an evaluation.

    python -m rg_jax.judge RUN/eval/NAME --url=http://localhost:8000/v1 --model=NAME

Reads predictions.jsonl of the folder, asks the endpoint (any OpenAI-compatible one) about every
sample at temperature 0, writes judge.jsonl, adds llm_score_open, _closed, _caption … to
metrics.json and writes the page anew. Prompts, answers and references are sent to that address and
nowhere else; pictures are not sent. Samples without a score are counted by reason.

Answers are kept (--answers): the same command goes on where it was stopped, and asks again only for
what failed. An evaluation that is made anew has no scores until it is judged anew, too.
"""

import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from rg_jax import cli
from rg_jax.endpoint import Endpoint
from rg_jax.errors import UserError
from rg_jax.evaluation import judge, page, refresh


def judge_folder(folder: Path, endpoint: Endpoint) -> dict:
    """Judges an evaluation's folder as the command does; returns the new content of metrics.json.

    Raises UserError if the folder holds no evaluation or the endpoint cannot be used; what is in
    the folder then stays as it was.
    """
    results, metrics = refresh.read_folder(folder)
    with tqdm(total=len(results), desc=f"judge {endpoint.model}", unit="sample") as bar:
        remover = metrics["set"].get("marks_removed", "ours")
        verdicts = judge.judge(results, endpoint, bar.update, remover)
    metrics = judge.add_figures(metrics, results, verdicts, endpoint.model)
    judge.write_verdicts(folder / judge.VERDICTS_FILE, verdicts)
    for path in refresh.refresh(folder, metrics, results):
        print(f"report page: {path}")
    return metrics


def main(argv: list[str]) -> None:
    """The command."""
    if len(argv) != 2:
        raise UserError(
            "name one evaluation: python -m rg_jax.judge RUN/eval/NAME --url=… --model=…"
        )
    if not FLAGS.url or not FLAGS.model:
        raise UserError("--url and --model are needed: the chat endpoint and its model's name")
    folder = Path(argv[1]).expanduser()
    endpoint = Endpoint(
        FLAGS.url,
        FLAGS.model,
        key_env=FLAGS.key_env,
        timeout=FLAGS.timeout,
        retries=FLAGS.retries,
        concurrency=FLAGS.concurrency,
        pause=FLAGS.pause,
        # Not in the evaluation's own folder, which a new evaluation replaces.
        cache_dir=FLAGS.answers or folder.absolute().parent / "judge_answers",
    )
    metrics = judge_folder(folder, endpoint)
    about = metrics["judge"]
    print(page.summary(metrics))
    print(f"judged by {about['model']}: {about['scored']:,} samples have a score")
    for reason, count in about["failed"].items():
        print(f"  without a score, {reason}: {count:,}")
    for fault, count in sorted(endpoint.faults.items()):
        print(f"  failed tries, {fault}: {count:,}")
    if not about["scored"]:
        raise UserError("not one answer of the judge could be used; see the reasons above")


if __name__ == "__main__":
    flags.DEFINE_string("url", "", "chat endpoint, e.g. http://localhost:8000/v1")
    flags.DEFINE_string("model", "", "the model's name there")
    flags.DEFINE_string("key_env", "", "environment variable with the API key")
    flags.DEFINE_float("timeout", 120, "seconds for one reply")
    flags.DEFINE_integer("retries", 5, "further tries after a failed one")
    flags.DEFINE_integer("concurrency", 8, "requests under way at once")
    flags.DEFINE_float("pause", 1, "seconds before the first retry")
    flags.DEFINE_string("answers", "", "folder of kept answers (default: judge_answers beside)")
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
