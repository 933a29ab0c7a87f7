"""The sigmoid loss over all pairs of a batch, and the training step around it.

Zhai et al. 2023 (https://arxiv.org/abs/2303.15343): every image with every caption is a yes-or-no
question of its own, so the loss is a sum that devices can make piece by piece. Each keeps its
images and hands its captions on to its neighbour, as often as there are devices: no device ever
holds more than its own rows against as many captions. Reports repeat themselves, so an equal
caption is a right one, whichever image it was written for.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rg_jax.model.contrastive import Contrastive
from rg_jax.model.paligemma import apply
from rg_jax.training.mesh import AXIS
from rg_jax.training.optimizer import Optimizer
from rg_jax.training.state import TrainState, unflatten
from rg_jax.training.step import finished

NO_TOKEN = -1


def captions_of(batch: Mapping[str, Array]) -> tuple[Int[Array, "B T"], Array]:
    """The target tokens of every row moved to its front, NO_TOKEN behind them; and where they are.

    Prompts differ between equal captions, and so would their places in the row.
    """
    chosen = batch["mask_loss"] > 0
    order = jnp.argsort(~chosen, axis=1, stable=True)
    tokens = jnp.take_along_axis(batch["text"], order, axis=1)
    valid = jnp.take_along_axis(chosen, order, axis=1)
    return jnp.where(valid, tokens, NO_TOKEN), valid


def pair_losses(
    images: Float[Array, "B W"],
    texts: Float[Array, "B W"],
    tokens: Int[Array, "B T"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: Mesh,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Per image the summed loss against every caption of the batch, and whether the caption that
    fits it best is a right one (1 or 0). All rows are spread over the devices of `mesh`.

    `tokens`: the captions' own (see `captions_of`), by which equal ones are known.
    """
    count = mesh.size
    ring = [(i, (i + 1) % count) for i in range(count)]

    @jax.checkpoint  # a block of logits is made again rather than kept for the way back
    def block(images, mine, texts, theirs, scale, bias):
        logits = scale * (images @ texts.T) + bias
        right = (mine[:, None, :] == theirs[None, :, :]).all(axis=-1)
        losses = jax.nn.softplus(jnp.where(right, -logits, logits)).sum(axis=1)
        best = logits.argmax(axis=1)
        found = jnp.take_along_axis(right, best[:, None], axis=1)[:, 0]
        return losses, logits.max(axis=1), found

    def rows(images, texts, tokens, scale, bias):
        def turn(carry, _):
            texts, theirs, total, peak, hit = carry
            losses, here, found = block(images, tokens, texts, theirs, scale, bias)
            hit = jnp.where(here > peak, found, hit)
            moved = (jax.lax.ppermute(x, AXIS, ring) for x in (texts, theirs))
            return (*moved, total + losses, jnp.maximum(peak, here), hit), None

        zero = images[:, 0] * 0
        start = (texts, tokens, zero, zero - jnp.inf, zero > 1)
        (_, _, total, _, hit), _ = jax.lax.scan(turn, start, length=count)
        return total, hit.astype(jnp.float32)

    spread = P(AXIS)
    return jax.shard_map(
        rows, mesh=mesh, in_specs=(spread, spread, spread, P(), P()), out_specs=(spread, spread)
    )(images, texts, tokens, scale, bias)


def make_pair_update(model: Contrastive, optimizer: Optimizer, mesh: Mesh) -> Callable:
    """The function (state, batch) → (state, metrics), to be jitted once.

    The loss is the sum over all pairs divided by the number of images. Metrics: loss, the share
    `batch_recall` of images whose best caption in the batch is a right one, scale and bias of the
    logits, norms, learning rate.
    """

    def loss_of(trainable, frozen, batch):
        params = unflatten({**trainable, **frozen})
        call = partial(apply, model, params)
        tokens, valid = captions_of(batch)
        images = call(batch["image"], method="embed_images")
        texts = call(jnp.maximum(tokens, 0), valid, method="embed_texts")
        scale, bias = call(method="logit_terms")
        losses, hits = pair_losses(images, texts, tokens, scale, bias, mesh)
        return losses.mean(), {"batch_recall": hits.mean(), "scale": scale, "bias": bias}

    def update(state: TrainState, batch: Mapping[str, jax.Array]):
        grads_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, aux), grads = grads_of(state.trainable, state.frozen, batch)
        return finished(optimizer, state, grads, {"loss": loss, **aux})

    return update
