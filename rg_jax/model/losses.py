"""Cross-entropy over a large vocabulary without ever holding all of its logits.

At 24 × 200 target tokens and 257k rows one float32 copy of the logits is 4.9 GB, and the plain
formulation keeps three. Here the vocabulary is walked in blocks: the forward pass carries a running
log-sum-exp, the backward pass makes each block's logits again and turns them into gradients at
once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DEFAULT_BLOCK = 16_384
SHARES = 8  # sizes in which the counted tokens are computed: an eighth of all, two eighths, …


def blockwise_token_losses(
    hidden: Float[Array, "*n D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "*n"],
    *,
    block_size: int = DEFAULT_BLOCK,
    valid_vocab: int | None = None,
    softcap: float | None = None,
    last_rows: Float[Array, "K D"] | None = None,
    counted: Bool[Array, "*n"] | None = None,
    groups: int = 1,
) -> Float[Array, "*n"]:
    """Each token's −log p(target), float32, over the first `valid_vocab` rows of the tied table.

    Logits are `hidden · row`, with `softcap` as c·tanh(logit / c). Products run in the dtype of
    `hidden`, sums in float32. Blocks need not divide the vocabulary. A target outside the valid
    rows costs infinity. The table gets a gradient only where one is asked for. `last_rows` stand in
    for the last K valid rows, so that these can learn while the table is frozen.

    What tokens that are not `counted` (prompts, padding) cost means nothing; they get no gradient,
    and hardly any logits are made for them: the counted ones are put side by side, and the smallest
    of `SHARES` shares of all tokens that holds them is computed. On several devices each puts its
    own side by side: the tokens are `groups` equal parts, of which every device has as many.
    Raises ValueError for a block size below 1, more valid rows than the table has, no valid row
    before the last ones, or groups that do not divide the tokens.
    """
    rows = table.shape[0] if valid_vocab is None else valid_vocab
    if block_size < 1:
        raise ValueError(f"block_size must be positive, not {block_size}.")
    if not 1 <= rows <= table.shape[0]:
        raise ValueError(f"valid_vocab {rows} is not within the table's {table.shape[0]} rows.")
    if last_rows is not None and len(last_rows) >= rows:
        raise ValueError(f"last_rows {len(last_rows)} leave none of the {rows} valid rows.")
    flat = hidden.reshape(-1, hidden.shape[-1])
    aims = targets.reshape(-1)
    if len(aims) % groups:
        raise ValueError(f"{len(aims)} tokens are not {groups} equal groups.")
    counts = None if counted is None else counted.reshape(groups, -1)

    def losses_of(flat, table, aims, rows):
        return _losses(min(block_size, rows), rows, softcap, flat, table, aims, counts)

    if last_rows is None:
        losses = losses_of(flat, table, aims, rows)
    else:
        losses = _with_last_rows(losses_of, rows, softcap, flat, table, aims, last_rows)
    return losses.reshape(targets.shape)


def _with_last_rows(losses_of, rows, softcap, flat, table, targets, last_rows):
    """The softmax over two tables: the first rows of one, then all of the other."""
    known = rows - len(last_rows)

    def capped(logits):
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    wide = {"preferred_element_type": jnp.float32}
    here = targets < known
    inside = jnp.where(here, targets, 0)
    chosen = capped(jnp.einsum("md,md->m", flat, table[inside].astype(flat.dtype), **wide))
    log_sum = chosen + losses_of(flat, table, inside, known)
    logits = capped(jnp.einsum("md,kd->mk", flat, last_rows.astype(flat.dtype), **wide))
    log_sum = jnp.logaddexp(log_sum, jax.nn.logsumexp(logits, axis=1))
    other = jnp.clip(targets - known, 0, len(last_rows) - 1)
    chosen = jnp.where(here, chosen, jnp.take_along_axis(logits, other[:, None], axis=1)[:, 0])
    return jnp.where(targets < rows, log_sum - chosen, jnp.inf)


def blockwise_cross_entropy(
    hidden: Float[Array, "*n D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "*n"],
    weights: Float[Array, "*n"] | Int[Array, "*n"],
    block_size: int = DEFAULT_BLOCK,
    valid_vocab: int | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of the token losses and the sum of the weights (see blockwise_token_losses).

    Tokens of weight 0 add exactly nothing, whatever their target.
    """
    losses = blockwise_token_losses(
        hidden, table, targets, block_size=block_size, valid_vocab=valid_vocab, softcap=softcap
    )
    weights = weights.astype(jnp.float32)
    return jnp.where(weights == 0, 0.0, losses * weights).sum(), weights.sum()


def per_example(
    losses: Float[Array, "B T"], weights: Float[Array, "B T"] | Int[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Weighted sum of token losses and sum of weights of every row: for the loss by task."""
    weights = weights.astype(jnp.float32)
    return jnp.where(weights == 0, 0.0, losses * weights).sum(axis=1), weights.sum(axis=1)


def _for_blocks(block: int, rows: int, body, state):
    """Run `body(start, first, state)` over the blocks that cover the valid rows.

    The last block is moved back so that it ends with the last valid row; `first` is the first row
    in it that no earlier block has seen.
    """
    if block >= rows:
        return body(0, 0, state)
    count = -(-rows // block)
    return jax.lax.fori_loop(
        0, count, lambda i, s: body(jnp.minimum(i * block, rows - block), i * block, s), state
    )


def _block_logits(flat, table, start, first, block, softcap):
    """Logits of one block of rows, capped, and which of its rows are new."""
    part = jax.lax.dynamic_slice_in_dim(table, start, block).astype(flat.dtype)
    logits = jnp.einsum("md,vd->mv", flat, part, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    fresh = start + jnp.arange(block) >= first
    return part, logits, fresh[None, :]


def _hits(targets, start, block):
    """Which column is the target of each token, where it lies in this block."""
    return targets[:, None] == (start + jnp.arange(block, dtype=targets.dtype))[None, :]


def _forward(block, rows, softcap, flat, table, targets):
    """Losses and log-sum-exps."""

    def body(start, first, state):
        peak, total, chosen = state
        _, logits, fresh = _block_logits(flat, table, start, first, block, softcap)
        logits = jnp.where(fresh, logits, -jnp.inf)
        new_peak = jnp.maximum(peak, logits.max(axis=1))
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[:, None]).sum(axis=1)
        here = jnp.where(_hits(targets, start, block), logits, -jnp.inf).max(axis=1)
        return new_peak, total, jnp.maximum(chosen, here)

    lowest = jnp.full(targets.shape, -jnp.inf, jnp.float32)
    state = (lowest, jnp.zeros_like(lowest), lowest)
    peak, total, chosen = _for_blocks(block, rows, body, state)
    log_sum = peak + jnp.log(total)
    return log_sum - chosen, log_sum


def _side_by_side(counted, function, *given):
    """`function` on the counted tokens side by side; its results at their places, zero elsewhere.

    `given`, its arguments: (M, …) for M tokens; it returns two tuples, what it has per token and
    the rest. `counted`: (groups, M / groups), or None for all. There is a branch for each share of
    the tokens, with shapes of its own, of which one runs.
    """
    if counted is None:
        return function(*given)
    groups, length = counted.shape
    group = jnp.arange(groups)[:, None]
    order = jnp.argsort(~counted, axis=1, stable=True)
    sizes = sorted({-(-length * share // SHARES) for share in range(1, SHARES + 1)})

    def branch(size):
        chosen = order[:, :size]

        def pick(x):
            parts = x.reshape(groups, length, *x.shape[1:])[group, chosen]
            return parts.reshape(groups * size, *x.shape[1:])

        def put(x):
            whole = jnp.zeros((groups, length, *x.shape[1:]), x.dtype)
            whole = whole.at[group, chosen].set(x.reshape(groups, size, *x.shape[1:]))
            return whole.reshape(groups * length, *x.shape[1:])

        def run():
            per_token, rest = function(*map(pick, given))
            return jax.tree.map(put, per_token), rest

        return run

    most = counted.sum(axis=1).max()
    which = jnp.searchsorted(jnp.asarray(sizes), most)
    return jax.lax.switch(which, [branch(size) for size in sizes])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _losses(block, rows, softcap, flat, table, targets, counted):
    return _losses_and_sums(block, rows, softcap, flat, table, targets, counted)[0]


def _losses_and_sums(block, rows, softcap, flat, table, targets, counted):
    def forward(flat, targets):
        return _forward(block, rows, softcap, flat, table, targets), ()

    return _side_by_side(counted, forward, flat, targets)[0]


def _losses_fwd(block, rows, softcap, flat, table, targets, counted):
    # With symbolic zeros JAX tells which inputs are differentiated: a frozen table (1.2 GB in the
    # 3B model) then costs neither the products nor the memory of a gradient nobody reads.
    counts = None if counted is None else counted.value
    given = (flat.value, table.value, targets.value, counts)
    losses, log_sum = _losses_and_sums(block, rows, softcap, *given)
    # An empty tuple or None: the answer travels as the structure of the residuals.
    wanted = (() if flat.perturbed else None, () if table.perturbed else None)
    return losses, (*given, log_sum, wanted)


def _losses_bwd(block, rows, softcap, saved, grad):
    flat, table, targets, counted, log_sum, wanted = saved
    if isinstance(grad, jax.custom_derivatives.SymbolicZero):
        return None, None, None, None
    grad = grad.astype(jnp.float32)
    if counted is not None:
        grad = jnp.where(counted.reshape(-1), grad, 0.0)

    def backward(flat, targets, log_sum, grad):
        return _gradients(block, rows, softcap, wanted, flat, table, targets, log_sum, grad)

    d_flat, d_table = _side_by_side(counted, backward, flat, targets, log_sum, grad)
    return d_flat, d_table, None, None


def _gradients(block, rows, softcap, wanted, flat, table, targets, log_sum, grad):
    """Of the hidden states and of the table, in their dtypes; None where not wanted."""
    flat_wanted, table_wanted = wanted

    def body(start, first, state):
        d_flat, d_table = state
        part, logits, fresh = _block_logits(flat, table, start, first, block, softcap)
        hits = _hits(targets, start, block).astype(jnp.float32)
        d_logits = jnp.exp(logits - log_sum[:, None]) - hits
        d_logits = jnp.where(fresh, d_logits * grad[:, None], 0.0)
        if softcap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / softcap))
        d_logits = d_logits.astype(flat.dtype)
        wide = {"preferred_element_type": jnp.float32}
        if flat_wanted is not None:
            d_flat = d_flat + jnp.einsum("mv,vd->md", d_logits, part, **wide)
        if table_wanted is not None:
            old = jax.lax.dynamic_slice_in_dim(d_table, start, block)
            new = old + jnp.einsum("mv,md->vd", d_logits, flat, **wide)
            d_table = jax.lax.dynamic_update_slice_in_dim(d_table, new, start, axis=0)
        return d_flat, d_table

    def zeros(like, wanted):
        return None if wanted is None else jnp.zeros(like.shape, jnp.float32)

    state = (zeros(flat, flat_wanted), zeros(table, table_wanted))
    d_flat, d_table = _for_blocks(block, rows, body, state)
    return (
        None if d_flat is None else d_flat.astype(flat.dtype),
        None if d_table is None else d_table.astype(table.dtype),
    )


_losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)
