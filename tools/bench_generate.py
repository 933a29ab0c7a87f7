"""How fast answers are generated: ours and, in turns, transformers' `generate`.

    python -m tools.bench_generate                          3B, 10 and 200 tokens, batch 1 to 128
    python -m tools.bench_generate --peer=default,static    needs the extra "bench"
    python -m tools.bench_generate --model=tiny --batches=16 --tokens=40 --peer=default \\
        --same_weights

Greedy, prompts of `--prompt_len` tokens, every row to the last token (nothing ends early, on
either side), random weights. 10 tokens are a short answer, 200 a report. With `--recipe=seg` the
masks of the first mentions are decoded too; the peers have none, so their figure is the same.
With `--same_weights` (float32) the two must choose the same tokens, else it is an error.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rg_jax.errors import UserError
from rg_jax.model.generate import generate, masks_of_generated
from rg_jax.model.paligemma import cast_for_inference
from rg_jax.training.state import unflatten
from tools import bench_peer
from tools import bench_setup as setup
from tools.bench_profile import profile
from tools.bench_profile import table as profile_table

CACHES = {"default": None, "static": "static"}  # the library's own default grows as it goes
NO_TOKEN = -1  # no row ends before the last token


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("bench_generate", __doc__)
    setup.add_flags(parser)
    parser.add_argument("--batches", default="1,8,64,128", help="numbers of rows, by commas")
    parser.add_argument("--tokens", default="10,200", help="numbers of new tokens, by commas")
    parser.add_argument("--prompt_len", type=int, default=0, help="text tokens (64; tiny: 32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--peer", default="", help=f"the peer's cache: {', '.join(CACHES)}")
    parser.add_argument("--profile", type=int, default=0, help="show so many costliest kernels")
    parser.add_argument("--same_weights", action="store_true", help="compare the tokens too")
    setup.run_bench(parser, argv, bench, table)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """All figures as one object: a row for each batch and length."""
    case = setup.make_case(options)
    dtype = case.config.compute_dtype
    flat = {k: v.astype(v.dtype) for k, v in setup.random_params(case).items()}
    params = jax.jit(lambda p: cast_for_inference(unflatten(p), case.config))(flat)
    peers, model = [name for name in options.peer.split(",") if name], None
    if unknown := set(peers) - set(CACHES):
        raise UserError(f"--peer={min(unknown)}: known are {', '.join(CACHES)}")
    if peers:
        torch_peer = bench_peer.load()
        model = torch_peer.make_model(case.config, "tuned", case.image_token)
        if options.same_weights:
            known = {k: np.asarray(v) for k, v in flat.items() if not k.startswith("masks/")}
            torch_peer.copy_params(model, known)
    del flat
    rows = []
    for batch in setup.numbers("batches", options.batches):
        prompts = _prompts(case, batch, options.prompt_len)
        for tokens in setup.numbers("tokens", options.tokens):
            sides: dict[str, Callable[[], Any]] = {"ours": _ours(case, params, prompts, tokens)}
            for name in peers:
                given = torch_peer.inputs(model, prompts)
                sides[name] = lambda given=given, name=name, tokens=tokens: torch_peer.generate(
                    model, given, tokens, CACHES[name]
                )
            if options.same_weights and dtype == "float32":
                _compare({name: run() for name, run in sides.items()}, batch, tokens)
            spent = setup.interleave(sides, options.rounds)
            row: dict[str, Any] = {"batch": batch, "tokens": tokens}
            for name, taken in spent.items():
                times = setup.summary(taken)
                row[name] = times | {"tokens_per_s": batch * tokens / times["seconds"]}
                if name != "ours":
                    row[name]["ratio"] = setup.ratio(spent["ours"], taken)
            if options.profile:
                row["profile"] = profile(sides["ours"], times=1) | {"shown": options.profile}
            rows.append(row)
    given = {k: v for k, v in vars(options).items() if v not in ("", 0, False) and k != "json"}
    return {
        "case": case.facts(),
        "options": given,
        "rows": rows,
        "peak_bytes": setup.peak_memory(),
        "versions": setup.versions(*(("torch", "transformers") if peers else ())),
    }


def _prompts(case: setup.Case, batch: int, length: int) -> dict[str, np.ndarray]:
    """Random images and prompts, all of one length."""
    rng = np.random.default_rng(batch)
    length = length or (32 if case.config.llm.width < 512 else 64)
    side, high = case.config.img.image_size, min(case.image_token, 250_000)
    return {
        "image": rng.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32),
        "text": rng.integers(3, high, (batch, length)).astype(np.int32),
        "mask_input": np.ones((batch, length), bool),
        "mask_ar": np.zeros((batch, length), np.int32),
    }


def _ours(case: setup.Case, params, prompts, tokens: int) -> Callable[[], np.ndarray]:
    """Compiled decoding of these prompts; with masks also those of the first mentions."""
    model, masks = case.model, case.slots > 0
    side = case.config.img.image_size

    def decode(params, image, text, mask_input):
        out = generate(
            model,
            params,
            image,
            text,
            mask_input,
            max_new_tokens=tokens,
            eos_id=NO_TOKEN,
            return_hidden=masks,
        )
        if not masks:
            return out, None
        # Whichever token comes first stands for `</seg>`.
        close_id = out["tokens"][0, 0]
        return out["tokens"], masks_of_generated(model, params, out, close_id, case.slots, side)

    # On the device beforehand, as the peer's inputs are.
    given = [jax.device_put(prompts[name]) for name in ("image", "text", "mask_input")]
    compiled = jax.jit(decode).lower(params, *given).compile()

    def run():
        found, mask = jax.device_get(compiled(params, *given))
        return found

    return run


def _compare(found: dict[str, np.ndarray], batch: int, tokens: int) -> None:
    for name, theirs in found.items():
        same = float((theirs == found["ours"]).mean())
        # A tie of two logits may fall either way, and the rest of that row with it.
        if same < 0.9:
            raise UserError(
                f"batch {batch}, {tokens} tokens: only {same:.0%} of the tokens of peer '{name}' "
                "are ours: the two do not compute the same"
            )


def table(figures: dict[str, Any]) -> str:
    """A line for each batch and length."""
    case = figures["case"]
    lines = [
        f"{case['recipe']}, {case['parameters'] / 1e6:,.1f} M parameters, {case['image_size']} px,"
        f" {case['compute_dtype']}",
        f"{'batch':>6}{'tokens':>8}  {'':<10}{'seconds':>10}{'tokens/s':>11}{'ours is':>10}",
    ]
    for row in figures["rows"]:
        for name in [k for k in row if k not in ("batch", "tokens", "profile")]:
            found = row[name]
            lines.append(
                f"{row['batch']:>6}{row['tokens']:>8}  {name:<10}{found['seconds']:>10.4f}"
                f"{found['tokens_per_s']:>11.0f}"
                + (f"{found['ratio']['ratio']:>9.2f}x" if "ratio" in found else "")
            )
        if "profile" in row:
            lines += profile_table(row["profile"], row["profile"]["shown"])
    return "\n".join([*lines, str(figures["versions"])])


if __name__ == "__main__":
    main()
