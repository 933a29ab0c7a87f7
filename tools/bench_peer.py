"""The published recipe in PyTorch: how fast transformers' PaliGemma 2 trains on this machine.

    python -m tools.bench_peer --kind=published         eager attention, gradient checkpointing
    python -m tools.bench_peer --kind=tuned             sdpa in the encoder, nothing recomputed
    python -m tools.bench_peer --kind=compiled          … through torch.compile

Needs the extra "bench". Made from its config with random weights: bfloat16 throughout on a GPU (as
the published run had it, where ours keeps float32 masters), float32 on a CPU; Adafactor with the
same settings, the same shapes and the same batch as `tools.bench_train`, which also measures the
two in turns (`--peer`). A mask decoder has no counterpart there: with `--recipe=seg` the peer is
without.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rg_jax.errors import UserError
from tools import bench_setup as setup


def main(argv: list[str] | None = None) -> None:
    parser = setup.Parser("bench_peer", __doc__)
    setup.add_flags(parser)
    parser.add_argument("--kind", default="published", help="published, tuned or compiled")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")

    def work():
        options = parser.parse_args(argv)
        case = setup.make_case(options)
        figures = {"case": case.facts(), "peer": bench(case, options.kind, options.steps)}
        figures["versions"] = setup.versions("torch", "transformers")
        if options.json != "-":
            print(f"{options.kind}: {figures['peer']}\n{figures['versions']}")
        setup.write_json(options.json, figures)

    setup.run_command(work)


def bench(case: setup.Case, kind: str, steps: int) -> dict[str, Any]:
    """The same figures as ours in `bench_train`."""
    from tools.bench_train import rates

    trainer = make_trainer(case, kind, setup.numpy_batch(case), None)
    losses: list[float] = []
    spent = setup.interleave({kind: lambda: losses.append(trainer.step())}, steps, warm=2)
    from tools import torch_peer

    found = rates(case, setup.summary(spent[kind]))
    return found | {"loss": losses[0], "peak_bytes": torch_peer.peak_bytes()}


def make_trainer(
    case: setup.Case, kind: str, batch: Mapping[str, np.ndarray], params: Mapping | None
):
    """A `torch_peer.Trainer` of the case; `params`: our flat parameters for it, or None: random.

    Raises UserError without torch or transformers, and for an unknown kind.
    """
    torch_peer = load()
    if kind not in torch_peer.KINDS:
        raise UserError(f"peer '{kind}' is not one of {', '.join(torch_peer.KINDS)}")
    model = torch_peer.make_model(case.config, kind, case.image_token)
    if params is not None:
        torch_peer.copy_params(model, params)
    spec = case.spec.optimizer
    return torch_peer.Trainer(
        model,
        kind,
        batch,
        accumulation=case.accumulation,
        freeze_encoder=case.freeze_encoder,
        lr=spec.lr,
        weight_decay=spec.weight_decay,
        clip_norm=spec.clip_norm,
    )


def load():
    """The module that needs torch; UserError where it is not installed."""
    try:
        from tools import torch_peer
    except ImportError as error:
        raise UserError(
            f'{error.name or error} is not installed: pip install -e ".[bench]" brings the peers'
        ) from error
    return torch_peer


if __name__ == "__main__":
    main()
