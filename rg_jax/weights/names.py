"""PyTorch's names and shapes of every parameter, and how they become ours and back.

Per layer, in one spelling whatever the version of the library: `vision.…`, `projector.…`,
`language.…` and `masks.…` (`canonical` brings a file's own spelling to it). A rule says which
tensors make one of our leaves; it only transposes, reshapes and stacks, so nothing is rounded and
the way back gives the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from rg_jax.errors import UserError
from rg_jax.model.config import DecoderConfig, ModelConfig, VisionConfig
from rg_jax.weights.source import Leaf

Shape = tuple[int, ...]


class Rule(NamedTuple):
    """One of our leaves: the tensors of a layer, and the two ways between them and it.

    `keys`: names, `{}` stands for the layer; `shapes`: theirs; `depth`: layers stacked on axis 0,
    0 for a leaf of its own. `ours(*tensors)` gives one layer, `theirs(layer)` its tensors.
    """

    keys: tuple[str, ...]
    shapes: tuple[Shape, ...]
    depth: int
    ours: Callable[..., np.ndarray]
    theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]

    def keys_of(self, layer: int) -> list[str]:
        """Names of the tensors of one layer."""
        return [key.format(layer) for key in self.keys]

    @property
    def all_keys(self) -> list[str]:
        """Names of all its tensors."""
        return [key for i in range(max(self.depth, 1)) for key in self.keys_of(i)]


def _same(keys: str, shape: Shape, depth: int = 0) -> Rule:
    return Rule((keys,), (shape,), depth, lambda x: x, lambda x: (x,))


def _linear(key: str, shape: Shape, depth: int = 0, heads: Shape | None = None) -> Rule:
    """A matrix (out, in) → ours (in, out), its axes split into `heads` where they are given."""
    target = heads or shape[::-1]
    return Rule(
        (key,),
        (shape,),
        depth,
        lambda x: x.T.reshape(target),
        lambda x: (x.reshape(shape[::-1]).T,),
    )


def _headed(keys: tuple[str, ...], heads: tuple[int, ...], d: int, h: int, depth: int) -> Rule:
    """Projections (heads * H, D) → (heads, D, H), several stacked into one leaf."""

    def ours(*tensors):
        each = [x.reshape(n, h, d).transpose(0, 2, 1) for x, n in zip(tensors, heads, strict=True)]
        return np.stack(each) if len(each) > 1 else each[0]

    def theirs(layer):
        parts = layer if len(heads) > 1 else [layer]
        return tuple(
            x.transpose(0, 2, 1).reshape(n * h, d) for x, n in zip(parts, heads, strict=True)
        )

    return Rule(keys, tuple((n * h, d) for n in heads), depth, ours, theirs)


def encoder_rules(img: VisionConfig) -> dict[str, Rule]:
    """SigLIP's vision tower without its projector."""
    w, m, n, h, depth = img.width, img.mlp_dim, img.num_heads, img.head_dim, img.depth
    patch = img.patch_size
    rules = {
        "img/embedding/kernel": Rule(
            ("vision.embeddings.patch_embedding.weight",),
            ((w, 3, patch, patch),),
            0,
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: (x.transpose(3, 2, 0, 1),),
        ),
        "img/embedding/bias": _same("vision.embeddings.patch_embedding.bias", (w,)),
        "img/pos_embedding": Rule(
            ("vision.embeddings.position_embedding.weight",),
            ((img.num_tokens, w),),
            0,
            lambda x: x[None],
            lambda x: (x[0],),
        ),
        "img/Transformer/encoder_norm/scale": _same("vision.post_layernorm.weight", (w,)),
        "img/Transformer/encoder_norm/bias": _same("vision.post_layernorm.bias", (w,)),
    }
    layer, block = "vision.encoder.layers.{}.", "img/Transformer/encoderblock/"
    for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        rules[f"{block}{ours}/scale"] = _same(f"{layer}{theirs}.weight", (w,), depth)
        rules[f"{block}{ours}/bias"] = _same(f"{layer}{theirs}.bias", (w,), depth)
    for ours, theirs, shape in (("Dense_0", "fc1", (m, w)), ("Dense_1", "fc2", (w, m))):
        dense = f"{block}MlpBlock_0/{ours}"
        rules[f"{dense}/kernel"] = _linear(f"{layer}mlp.{theirs}.weight", shape, depth)
        rules[f"{dense}/bias"] = _same(f"{layer}mlp.{theirs}.bias", shape[:1], depth)
    attention = f"{block}MultiHeadDotProductAttention_0/"
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        key = f"{layer}self_attn.{theirs}"
        rules[f"{attention}{ours}/kernel"] = _linear(f"{key}.weight", (w, w), depth, (w, n, h))
        rules[f"{attention}{ours}/bias"] = Rule(
            (f"{key}.bias",),
            ((w,),),
            depth,
            lambda x: x.reshape(n, h),
            lambda x: (x.reshape(w),),
        )
    key = f"{layer}self_attn.out_proj"
    rules[f"{attention}out/kernel"] = _linear(f"{key}.weight", (w, w), depth, (n, h, w))
    rules[f"{attention}out/bias"] = _same(f"{key}.bias", (w,), depth)
    return rules


def decoder_rules(llm: DecoderConfig) -> dict[str, Rule]:
    """Gemma 2 with its table; the tied output is no tensor of its own."""
    d, m, n, k, h, depth = (
        llm.width,
        llm.mlp_dim,
        llm.num_heads,
        llm.num_kv_heads,
        llm.head_dim,
        llm.depth,
    )
    layer = "language.layers.{}."
    q, key, v, o = (f"{layer}self_attn.{name}_proj.weight" for name in "qkvo")
    rules = {
        "llm/embedder/input_embedding": _same("language.embed_tokens.weight", (llm.vocab_size, d)),
        "llm/final_norm/scale": _same("language.norm.weight", (d,)),
        "llm/layers/attn/attn_vec_einsum/w": _linear(o, (d, n * h), depth, (n, h, d)),
        "llm/layers/mlp/gating_einsum": Rule(
            (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
            ((m, d), (m, d)),
            depth,
            lambda gate, up: np.stack([gate.T, up.T]),
            lambda x: (x[0].T, x[1].T),
        ),
        "llm/layers/mlp/linear": _linear(f"{layer}mlp.down_proj.weight", (d, m), depth),
    }
    if llm.fused_qkv:
        rules["llm/layers/attn/qkv_einsum/w"] = _headed((q, key, v), (n, n, n), d, h, depth)
    else:
        rules["llm/layers/attn/q_einsum/w"] = _headed((q,), (n,), d, h, depth)
        rules["llm/layers/attn/kv_einsum/w"] = _headed((key, v), (k, k), d, h, depth)
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
    if llm.post_norms:
        norms["post_attention_norm"] = "post_attention_layernorm"
        norms["post_ffw_norm"] = "post_feedforward_layernorm"
    for ours, theirs in norms.items():
        rules[f"llm/layers/{ours}/scale"] = _same(f"{layer}{theirs}.weight", (d,), depth)
    return rules


def model_rules(model: ModelConfig) -> dict[str, Rule]:
    """Every leaf of the model but those of a mask decoder, in the order of the table of names."""
    width, out = model.img.width, model.llm.width
    projector = {
        "img/head/kernel": _linear("projector.linear.weight", (out, width)),
        "img/head/bias": _same("projector.linear.bias", (out,)),
    }
    return {**encoder_rules(model.img), **projector, **decoder_rules(model.llm)}


def leaf_of(rule: Rule, tensors: Mapping[str, Leaf]) -> Leaf:
    """Our leaf from its tensors, read layer by layer into place. All of them must be there."""
    shape = _layer_shape(rule)
    dtype = tensors[rule.all_keys[0]].dtype
    if not rule.depth:

        def read_one(target: np.dtype) -> np.ndarray:
            array = rule.ours(*(tensors[key].stored() for key in rule.keys))
            return np.ascontiguousarray(array, target)

        return Leaf(shape, dtype, read_one)

    def read(target: np.dtype) -> np.ndarray:
        out = np.empty((rule.depth, *shape), target)
        for i in range(rule.depth):
            out[i] = rule.ours(*(tensors[key].stored() for key in rule.keys_of(i)))
        return out

    return Leaf((rule.depth, *shape), dtype, read)


def _layer_shape(rule: Rule) -> Shape:
    """Shape of one layer of the leaf, found on arrays that take no memory."""
    return rule.ours(*(np.broadcast_to(np.zeros(()), shape) for shape in rule.shapes)).shape


def tensors_of(rule: Rule, leaf: Leaf, dtype: np.dtype) -> dict[str, Leaf]:
    """The tensors that our leaf becomes, in `dtype`; the leaf is read once for all of them.

    They are to be read in their order: the array is kept from the first to the last of them.
    """
    held: list[np.ndarray] = []
    last = rule.all_keys[-1]

    def read(key: str, layer: int, part: int, target: np.dtype) -> np.ndarray:
        if not held:
            held.append(leaf.stored())
        array = held[0][layer] if rule.depth else held[0]
        out = np.ascontiguousarray(rule.theirs(array)[part], target)
        if key == last:
            held.clear()
        return out

    found = {}
    for layer in range(max(rule.depth, 1)):
        for part, (key, shape) in enumerate(zip(rule.keys_of(layer), rule.shapes, strict=True)):

            def reader(target, key=key, layer=layer, part=part):
                return read(key, layer, part, target)

            found[key] = Leaf(shape, np.dtype(dtype), reader)
    return found


# ---------------------------------------------------------------- spellings

_SPELLINGS = (
    (re.compile(r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"), "vision."),
    (re.compile(r"(?:model\.)?multi_modal_projector\.(.+)"), "projector."),
    (re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?!lm_head)(.+)"), "language."),
    (re.compile(r"segmentation_head\.(.+)"), "masks."),
    (re.compile(r"(?:language_model\.)?(lm_head\.weight)"), ""),
)
# What some versions of the library save that is computed, not learnt.
COMPUTED = (".position_ids", ".rotary_emb.inv_freq")
# How the files of Google's own repositories spell it; every version of the library reads that.
_WRITTEN = {
    "vision": "vision_tower.vision_model",
    "projector": "multi_modal_projector",
    "language": "language_model.model",
}


def canonical(key: str) -> str | None:
    """A key of a PaliGemma file in the spelling of this module; None if it is none of its own."""
    for pattern, start in _SPELLINGS:
        if found := pattern.fullmatch(key):
            return start + found[1]
    return None


def written(key: str) -> str:
    """The spelling in which we write a key; the inverse of `canonical`."""
    part, _, rest = key.partition(".")
    return f"{_WRITTEN[part]}.{rest}"


# ---------------------------------------------------------------- mask decoder

_MODULES = (("layers.", "layers_"), ("mlp.0", "mlp_in"), ("mlp.2", "mlp_out"))


def mask_leaf(key: str) -> tuple[str, bool]:
    """Our name (below `masks/`) of a tensor of the mask decoder, and whether it is transposed.

    Linear maps are kept (out, in) there and (in, out) here; a norm's weight is our scale.
    """
    for theirs, ours in _MODULES:
        key = key.replace(theirs, ours)
    *modules, last = key.split(".")
    if not modules or last not in ("weight", "bias"):
        return "/".join([*modules, last]), False
    norm = "norm" in modules[-1]
    last = "bias" if last == "bias" else "scale" if norm else "kernel"
    return "/".join([*modules, last]), last == "kernel"


def mask_key(name: str) -> tuple[str, bool]:
    """The inverse of `mask_leaf`."""
    *modules, last = name.split("/")
    key = ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(last, last)])
    for theirs, ours in _MODULES:
        key = key.replace(ours, theirs)
    return key, last == "kernel"


def transposed(leaf: Leaf) -> Leaf:
    """The leaf with its axes turned round."""

    def read(dtype: np.dtype) -> np.ndarray:
        return np.ascontiguousarray(leaf.stored().T, dtype)

    return Leaf(leaf.shape[::-1], leaf.dtype, read)


def mask_leaves(tensors: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """Tensors of a mask decoder, by their names below it, as our leaves `masks/…`."""
    leaves = {}
    for key, leaf in tensors.items():
        name, turn = mask_leaf(key)
        leaves[f"masks/{name}"] = transposed(leaf) if turn else leaf
    return leaves


def mask_tensors(leaves: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The inverse of `mask_leaves`; leaves of other parts are passed over."""
    tensors = {}
    for name, leaf in leaves.items():
        if name.startswith("masks/"):
            key, turn = mask_key(name.removeprefix("masks/"))
            tensors[key] = transposed(leaf) if turn else leaf
    return tensors


def check_shapes(path: str, rule: Rule, tensors: Mapping[str, Leaf], spelled: Mapping[str, str]):
    """Raises UserError for tensors of another shape than the file's own config gives them."""
    for layer in range(max(rule.depth, 1)):
        for key, shape in zip(rule.keys_of(layer), rule.shapes, strict=True):
            if tensors[key].shape != shape:
                raise UserError(
                    f"{path}: {spelled.get(key, key)} is {tensors[key].shape}, but the model of "
                    f"its config.json needs {shape}"
                )
