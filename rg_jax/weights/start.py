"""The parameters that a run starts from: one or two sources, its own tokenizer, its own shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import GroundingFormat
from rg_jax.model.config import DecoderConfig, MaskDecoderConfig, ModelConfig
from rg_jax.weights.hf_tokenizer import check_same
from rg_jax.weights.source import Adapt, Put, Source, load
from rg_jax.weights.vocabulary import adapters

PROJECTOR = "img/head/"
# What shapes do not show but the numbers were trained with.
_ARITHMETIC = ("query_scale", "attn_softcap", "rope_base", "norm_eps")
Tell = Callable[[str], object]


def check_writes_alike(
    source: Source, fmt: GroundingFormat, masks: MaskDecoderConfig | None
) -> None:
    """Raises UserError where the weights write places otherwise than the run is to.

    Weights that say nothing of it (the original ones) go with everything.
    """
    differ = []
    if source.fmt is not None and source.fmt != fmt:
        theirs, ours = source.fmt.to_json(), fmt.to_json()
        differ += [
            f"{name} {theirs[name]!r} (config.grounding: {ours[name]!r})"
            for name in theirs
            if theirs[name] != ours[name]
        ]
    if source.masks is not None and masks is not None and not same_masks(source.masks, masks):
        differ.append(f"mask decoder {source.masks.kind!r} of width {source.masks.width}")
    if differ:
        raise UserError(
            f"{source.path} writes places otherwise than config.grounding and config.masks say: "
            f"{'; '.join(differ)}. --config.weights_format=weights goes on as the weights do, "
            "--config.weights_format=config teaches them the config's way"
        )


def same_masks(one: MaskDecoderConfig, other: MaskDecoderConfig) -> bool:
    """Whether two mask decoders are the same thing, whatever fields their kind does not use."""
    unused = {"mask_tokens": 1} if one.kind == other.kind == "published" else {}
    return dataclasses.replace(one, **unused) == dataclasses.replace(other, **unused)


def read_start(
    base: Source | None,
    encoder: Source | None,
    wanted: Mapping[str, Any],
    *,
    model: ModelConfig,
    tokenizer: Tokenizer,
    put: Put,
    seed: int,
    tell: Tell,
    adapt: Adapt | None = None,
) -> dict[str, Any]:
    """The flat parameters that the sources hold, each through `put` as soon as it is read.

    `base`: a whole model or a part of one; `encoder`: one whose `img/…` goes over that of `base`
    (the projector only if it has one). `wanted`: flat name → shape and dtype. Extra tokens that a
    source has under another id are moved, new ones start near the mean, positions are resized;
    `tell` is told of all this, in sentences; `adapt`: what else may be of another shape, as in
    `source.load`. Names that no source holds are not in the result.
    Raises UserError, see `source.load`.
    """
    given: dict[str, Source] = {}
    if base is not None:
        chosen = _fitting_masks(base, model, tell)
        given |= dict.fromkeys(_names_of(chosen, wanted), chosen)
    if encoder is not None:
        tower = encoder.only("img")
        given |= dict.fromkeys(_names_of(tower, wanted), tower)
    params: dict[str, Any] = {}
    for source in {id(s): s for s in given.values()}.values():
        for note in source.notes:
            tell(f"{source.path}: {note}")
        _check_arithmetic(source, model)
        check_same(source.path, source.tokens, tokenizer)
        own = {name: wanted[name] for name in wanted if given.get(name) is source}
        # What another source provides is no stranger here; what the run does not want is.
        leaves = {n: x for n, x in source.leaves.items() if n in own or n not in wanted}
        usable = dataclasses.replace(source, leaves=leaves)
        fitting = adapters(
            tokenizer.vocab_size,
            known=tokenizer.base_size,
            moved=moved_rows(source, tokenizer),
            seed=seed,
            tell=lambda change, path=source.path: tell(f"{path}: {change}"),
        )
        params |= load(usable, own, put=put, adapt={**fitting, **(adapt or {})})
    return params


def _names_of(source: Source, wanted: Mapping[str, Any]) -> list[str]:
    """What a source has to hold: its parts, the projector only where it has begun with one."""
    held = [*source.leaves, *source.missing]
    parts = {*source.parts, *(name.partition("/")[0] for name in held)}
    alone = "llm" not in source.parts and not any(name.startswith(PROJECTOR) for name in held)
    return [
        name
        for name in wanted
        if name.partition("/")[0] in parts and not (alone and name.startswith(PROJECTOR))
    ]


def moved_rows(source: Source, tokenizer: Tokenizer) -> dict[int, int] | None:
    """Our id → the source's row, of `<image>` and every extra token that both have.

    None where the source does not say which tokens were added to it.
    """
    if not source.extra_tokens:
        return None if source.extra_tokens is None else {}
    first = tokenizer.image_id + 1
    rows = {token: first + i for i, token in enumerate(source.extra_tokens)}
    ours = zip(tokenizer.extra_tokens, tokenizer.extra_ids, strict=True)
    moved = {i: rows[token] for token, i in ours if token in rows}
    return {tokenizer.image_id: tokenizer.image_id, **moved}


def _fitting_masks(base: Source, model: ModelConfig, tell: Tell) -> Source:
    """The source without a mask decoder that the run has no use for; both cases are told."""
    if base.masks is None:
        return base
    if model.masks is None:
        tell(f"{base.path}: its mask decoder is not used, as config.masks.kind is empty")
    elif not same_masks(base.masks, model.masks):
        tell(f"{base.path}: its mask decoder is not used: config.masks describes another one")
    else:
        return base
    return base.without("masks")


def _check_arithmetic(source: Source, model: ModelConfig) -> None:
    if source.model is None or source.kind == "npz":  # a .npz does not say it
        return
    theirs: DecoderConfig = source.model.llm
    for name in _ARITHMETIC:
        if getattr(theirs, name) != getattr(model.llm, name):
            raise UserError(
                f"{source.path} was made with llm.{name}={getattr(theirs, name)!r}, the config has "
                f"{getattr(model.llm, name)!r}: set config.model.llm.{name} in the config file"
            )
