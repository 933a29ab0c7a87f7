"""PaliGemma 2 of big_vision against ours, on the same weights and the same random inputs.

    git clone https://github.com/google-research/big_vision
    PYTHONPATH=big_vision python -m tools.compare_big_vision --weights=weights/FILE.npz

Prints the largest difference of the image tokens, of the hidden states and of the logits, absolute
and relative to the largest entry, and ends with exit code 1 where one is above --tolerance. Each
model is loaded by its own loader and gone before the other one comes. Needs big_vision's own
requirements beside ours, and in float32 four bytes per parameter.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from rg_jax import cli
from rg_jax.errors import UserError
from rg_jax.model.config import ModelConfig
from rg_jax.model.paligemma import PaliGemma, apply, param_shapes
from rg_jax.weights.formats import open_weights
from rg_jax.weights.source import load

PALIGEMMA = "big_vision.models.proj.paligemma.paligemma"
GEMMA = "big_vision.models.ppp.gemma"
VARIANTS = ("gemma2_2b", "gemma2_9b", "gemma2_27b")
# Of the encoder that all PaliGemma 2 share, by width.
ENCODERS = {1152: "So400m/14"}

Outputs = dict[str, np.ndarray]


def imported(name: str) -> Any:
    """A module of big_vision. Raises UserError where it, or what it needs, is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name} cannot be imported ({error}): put a checkout of big_vision on PYTHONPATH and "
            "install its requirements"
        ) from error


def their_config(model: ModelConfig, encoder: str = "") -> ml_collections.ConfigDict:
    """The settings under which big_vision builds a model of these dimensions.

    `encoder`: the name of its variant, where the width does not say it. Raises UserError if
    big_vision has no such decoder.
    """
    gemma = imported(GEMMA)
    for variant in VARIANTS:
        try:
            known = gemma.get_config(variant)
        except (ValueError, KeyError):  # a checkout from before PaliGemma 2
            continue
        if (known.width, known.depth) == (model.llm.width, model.llm.depth):
            break
    else:
        raise UserError(
            f"this big_vision has no Gemma 2 of width {model.llm.width} and {model.llm.depth} "
            f"layers among {', '.join(VARIANTS)}: take a newer checkout"
        )
    encoder = encoder or ENCODERS.get(model.img.width, "")
    if not encoder:
        raise UserError(f"--encoder is needed: which variant has a width of {model.img.width}?")
    config = ml_collections.ConfigDict()
    config.img = {"variant": encoder, "pool_type": "none", "scan": True}
    config.llm = {"variant": variant, "vocab_size": model.llm.vocab_size}
    config.final_softcap = known.get("final_logits_softcap") or 0.0
    return config


def random_inputs(model: ModelConfig, batch: int, length: int, seed: int = 0):
    """Image (B, S, S, 3) in [-1, 1], text (B, T), mask_ar (B, T): half prefix, half target."""
    random = np.random.default_rng(seed)
    side = model.img.image_size
    image = random.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)
    text = random.integers(3, model.llm.vocab_size, (batch, length)).astype(np.int32)
    mask_ar = np.broadcast_to(np.arange(length) >= length // 2, text.shape).astype(np.int32)
    return image, text, mask_ar


def run_theirs(weights: str, config: ml_collections.ConfigDict, inputs) -> Outputs:
    """big_vision's outputs with what its own loader makes of the file."""
    module = imported(PALIGEMMA)
    model = module.Model(img=config.img.to_dict(), llm=config.llm.to_dict())
    params = module.load(None, weights, config)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), dict(params))

    @jax.jit
    def run(params, image, text, mask_ar):
        logits, out = model.apply({"params": params}, image, text, mask_ar)
        return {"image tokens": out["img/zimg"], "hidden": out["llm/pre_logits"], "logits": logits}

    return jax.device_get(run(params, *inputs))


def run_ours(weights: str, model: ModelConfig, inputs) -> Outputs:
    """Our outputs, in float32."""
    params = load(open_weights(weights), param_shapes(model), put=lambda _, x: jnp.asarray(x))

    @jax.jit
    def run(params, image, text, mask_ar):
        tokens, _ = apply(PaliGemma(model), params, image, method="embed_image")
        hidden = apply(PaliGemma(model), params, image, text, mask_ar)["hidden"]
        own = hidden[:, tokens.shape[1] :]
        logits = apply(PaliGemma(model), params, own, method="logits")
        return {"image tokens": tokens, "hidden": hidden, "logits": logits}

    return jax.device_get(run(params, *inputs))


def differences(theirs: Outputs, ours: Outputs) -> dict[str, tuple[float, float]]:
    """Of each output the largest difference, and that over the largest entry of theirs.

    Raises UserError where the shapes differ.
    """
    found = {}
    for name, expected in theirs.items():
        if expected.shape != ours[name].shape:
            raise UserError(f"{name}: theirs are {expected.shape}, ours {ours[name].shape}")
        gap = float(np.abs(expected.astype(np.float64) - ours[name]).max())
        found[name] = gap, gap / max(float(np.abs(expected).max()), 1e-30)
    return found


def main(argv: list[str]) -> None:
    """The command."""
    if argv[1:] or not FLAGS.weights:
        raise UserError("usage: python -m tools.compare_big_vision --weights=FILE.npz")
    model = open_weights(FLAGS.weights).model
    if model is None:
        raise UserError(f"{FLAGS.weights} does not hold a whole PaliGemma 2")
    config = their_config(model, FLAGS.encoder)
    # The cap on the logits is a setting of both: ours is set as theirs is.
    model = model.replace(
        compute_dtype="float32", llm={"final_softcap": config.final_softcap or None}
    )
    inputs = random_inputs(model, FLAGS.batch, FLAGS.length)
    with jax.default_matmul_precision("highest"):
        theirs = run_theirs(FLAGS.weights, config, inputs)
        ours = run_ours(FLAGS.weights, model, inputs)
    found = differences(theirs, ours)
    for name, (absolute, relative) in found.items():
        print(f"{name:<13} largest difference {absolute:.3g}, relative {relative:.3g}")
    worst = max(relative for _, relative in found.values())
    if not worst <= FLAGS.tolerance:
        print(f"the two differ: {worst:.3g} is above --tolerance={FLAGS.tolerance:g}")
        sys.exit(1)


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "an original .npz, whole")
    flags.DEFINE_string("encoder", "", "big_vision's name of the encoder (default: by its width)")
    flags.DEFINE_integer("batch", 1, "images")
    flags.DEFINE_integer("length", 32, "text tokens per image")
    flags.DEFINE_float("tolerance", 1e-4, "largest relative difference that passes")
    FLAGS = flags.FLAGS
    sys.exit(cli.main(main))
