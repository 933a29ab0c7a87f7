"""The mask decoder: the published form against its numbers, and what ours adds."""

import json
import os
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rg_jax.model.mask_decoder import MaskDecoder, MaskDecoderConfig, resize_logits, sine_code
from rg_jax.model.mask_losses import cross_entropy_pixels, dice_masks, focal_pixels, mask_loss_sums
from rg_jax.weights.names import mask_leaf

GOLDEN = Path(os.environ.get("RG_JAX_GOLDEN", Path(__file__).parents[1] / "golden"))
FILE = GOLDEN / "mask_decoder.npz"


@cache
def arrays():
    with np.load(FILE) as file:
        return {key: file[key] for key in file.files}


META = json.loads(str(arrays()["meta_json"])) if FILE.exists() else {}
CASES = sorted({key.split("/")[0] for key in arrays() if "/" in key}) if FILE.exists() else []
on_every_case = pytest.mark.parametrize("case", CASES)


def case_of(name):
    """(config, params, {key without the case: array})"""
    own = {k[len(name) + 1 :]: v for k, v in arrays().items() if k.startswith(f"{name}/")}
    meta = META[name]
    config = MaskDecoderConfig(
        kind="published",
        width=meta["proj"],
        depth=meta["layers"],
        num_heads=meta["heads"],
        mlp_dim=own["w/transformer.layers.0.mlp.0.weight"].shape[0],
        project_prompt=False,
        channels=meta["classes"],
    )
    weights = {k[2:]: v for k, v in own.items() if k.startswith("w/")}
    return config, _tree(weights), own


def _tree(weights):
    """Torch names → our tree; used for weights and, the other way round, for gradients."""
    tree = {}
    for name, value in weights.items():
        path = _path(name)
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value.T if path[-1] == "kernel" else value
    return tree


def _path(name):
    return tuple(mask_leaf(name)[0].split("/"))


def _leaf(tree, name):
    for key in _path(name):
        tree = tree[key]
    return np.asarray(tree).T if _path(name)[-1] == "kernel" else np.asarray(tree)


def target_of(own, like):
    """The target of a case, the same for every class unless it has classes of its own."""
    target = own["in/target"].astype(np.float32)
    return jnp.broadcast_to(target if target.ndim == 4 else target[:, None], like.shape)


def close(ours, golden, tolerance, what=""):
    np.testing.assert_allclose(ours, golden, rtol=0, atol=tolerance, err_msg=what)


@on_every_case
def test_golden_mask_decoder_forward_and_losses(case):
    config, params, own = case_of(case)
    tolerance = max(2e-5, 5 * META[case].get("max_abs_diff_float32_vs_float64", 0))
    run = jax.jit(MaskDecoder(config).apply)
    logits = run({"params": params}, own["in/image_feats"], own["in/p_end_embed"][:, None])
    close(logits[:, 0], own["out/logits16"], tolerance)
    masks = resize_logits(logits[:, 0], own["out/mask224"].shape[-2:])
    close(masks, own["out/mask224"], tolerance)
    seen = [key for key in own if key.startswith("loss/")]
    if not seen:
        return
    golden = jnp.asarray(own["out/mask224"])
    target = target_of(own, golden)
    ours = {
        "bce": cross_entropy_pixels(golden, target).mean(axis=(-2, -1)),
        "dice": dice_masks(golden, target),
        "focal": focal_pixels(golden, target).mean(axis=(-2, -1)),
    }
    expected = {
        "loss/bce_mean": ours["bce"].mean(),
        "loss/dice": ours["dice"].mean(),
        "loss/total": ours["bce"].mean() + ours["dice"].mean(),
        "loss/focal": ours["focal"].mean(),
        "loss/focal_plus_dice": ours["focal"].mean() + ours["dice"].mean(),
        **{f"loss/per_sample_{kind}": ours[kind].mean(axis=1) for kind in ours},
    }
    assert set(seen) <= set(expected), f"losses that no test computes: {seen}"
    for key in seen:
        np.testing.assert_allclose(expected[key], own[key], rtol=1e-5, atol=1e-6, err_msg=key)


@on_every_case
def test_golden_mask_decoder_gradients(case):
    config, params, own = case_of(case)
    if "in/target" not in own:
        assert not [key for key in own if key.startswith("grad")], "gradients without a target"
        return
    size = own["in/target"].shape[-2:]

    def losses(masks):
        target = target_of(own, masks)
        bce, dice = cross_entropy_pixels(masks, target).mean(), dice_masks(masks, target).mean()
        return {
            "bce": bce,
            "dice": dice,
            "total": bce + dice,
            "focal": (focal := focal_pixels(masks, target).mean()),
            "focal_plus_dice": focal + dice,
        }

    def relative(ours, golden, what):
        # Biases of keys have no gradient at all: what is there is rounding, compared as such.
        scale = max(float(np.abs(golden).max()), 1e-3 if "k_proj.bias" in what else 1e-9)
        close(np.asarray(ours) / scale, golden / scale, 1e-4, what)

    for key, golden in own.items():
        kind, _, term = key.partition("/")
        if kind == "grad224":
            ours = jax.grad(lambda m, t=term: losses(m)[t])(jnp.asarray(own["out/mask224"]))
        elif kind == "grad16":
            logits = jnp.asarray(own["out/logits16"])
            ours = jax.grad(lambda x, t=term: losses(resize_logits(x, size))[t])(logits)
        else:
            continue
        relative(ours, golden, key)

    def total(params, image, prompt):
        logits = MaskDecoder(config).apply({"params": params}, image, prompt[:, None])[:, 0]
        return losses(resize_logits(logits, size))["total"]

    inputs = (own["in/image_feats"], own["in/p_end_embed"])
    d_params, *d_inputs = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(params, *inputs)
    for key, value in zip(("image_feats", "p_end_embed"), d_inputs, strict=True):
        if f"grad_in/{key}" in own:
            relative(value, own[f"grad_in/{key}"], key)
    for key, golden in own.items():
        if key.startswith("grad_w/"):
            relative(_leaf(d_params, key[len("grad_w/") :]), golden, key)


def test_golden_mask_decoder_is_there():
    assert CASES and all("w/img_projection.weight" in case_of(case)[2] for case in CASES)


SAM = MaskDecoderConfig(width=32, num_heads=4, mlp_dim=64, mask_tokens=2)


@cache
def sam(config=SAM, patches=16):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(2, patches, 24)).astype(np.float32)
    prompts = rng.normal(size=(2, 3, 20)).astype(np.float32)
    decoder = MaskDecoder(config)
    params = jax.jit(decoder.init)(jax.random.key(0), image, prompts)
    return jax.jit(decoder.apply), params, image, prompts


def test_sam_masks_are_four_times_the_grid():
    run, params, image, prompts = sam()
    masks = run(params, image, prompts)
    assert masks.shape == (2, 3, 1, 16, 16) and masks.dtype == jnp.float32
    assert resize_logits(masks, (40, 31)).shape == (2, 3, 1, 40, 31)


@pytest.mark.parametrize("kind", ["sam", "published"])
def test_slots_do_not_see_each_other(kind):
    config = (
        SAM
        if kind == "sam"
        else MaskDecoderConfig(kind="published", width=32, num_heads=4, mlp_dim=64)
    )
    run, params, image, prompts = sam(config)
    masks = np.asarray(run(params, image, prompts))
    other = prompts.copy()
    other[:, 1] += 1
    changed = np.asarray(run(params, image, other)) != masks
    assert changed[:, 1].any() and not changed[:, [0, 2]].any()
    other = image.copy()
    other[1] += np.linspace(0, 1, 24)
    changed = np.asarray(run(params, other, prompts)) != masks
    assert changed[1].any() and not changed[0].any()


def test_only_ours_knows_where_a_patch_lies():
    """Patches in another order: published masks are reordered alike, ours are not."""
    order = np.random.default_rng(1).permutation(16)
    published = MaskDecoderConfig(kind="published", width=32, num_heads=4, mlp_dim=64)
    run, params, image, prompts = sam(published)
    masks = np.asarray(run(params, image, prompts)).reshape(6, 16)
    again = np.asarray(run(params, image[:, order], prompts)).reshape(6, 16)
    np.testing.assert_allclose(again, masks[:, order], atol=1e-5)
    run, params, image, prompts = sam()
    flat = np.zeros_like(image)  # the same everywhere: only the position can make a difference
    masks = np.asarray(run(params, flat, prompts))[0, 0, 0]
    cells = masks.reshape(4, 4, 4, 4).transpose(0, 2, 1, 3).reshape(16, 16)
    assert np.abs(cells - cells[:1]).max(axis=1)[1:].min() > 1e-4


def test_every_parameter_of_sam_learns():
    run, params, image, prompts = sam()
    grads = jax.grad(lambda p: jnp.square(run(p, image, prompts) - 1).mean())(params)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads)[0]:
        if "k_proj" in str(path) and "bias" in str(path):
            continue  # adds the same to all scores of a query
        assert np.abs(leaf).max() > 0, path


def test_codes_tell_all_patches_apart():
    code = np.asarray(sine_code(5, 16))
    assert code.shape == (25, 16)
    gaps = np.linalg.norm(code[:, None] - code[None], axis=-1) + 10 * np.eye(25)
    assert gaps.min() > 0.1


@pytest.mark.parametrize("kind", ["focal", "bce"])
def test_empty_slots_are_free(kind):
    logits = jnp.asarray([[[3.0, -2.0]], [[np.inf, np.nan]], [[1e30, -1e30]]])
    targets = jnp.asarray([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])

    def total(logits, valid):
        sums = mask_loss_sums(logits, targets, valid, kind)
        return sum(value.sum() for value in sums.values())

    grad = jax.value_and_grad(total)
    alone, d_alone = jax.value_and_grad(
        partial(
            lambda x: sum(
                v.sum() for v in mask_loss_sums(x, targets[:1], np.array([True]), kind).values()
            )
        )
    )(logits[:1])
    value, d_logits = grad(logits, jnp.asarray([True, False, False]))
    assert float(value) == float(alone)
    np.testing.assert_array_equal(d_logits[:1], d_alone)
    np.testing.assert_array_equal(d_logits[1:], 0)
    value, d_logits = grad(logits, jnp.zeros(3, bool))
    assert float(value) == 0 and not np.asarray(d_logits).any()


def test_losses_of_a_perfect_and_a_wrong_mask():
    target = jnp.asarray(np.indices((8, 8)).sum(0) % 2, jnp.float32)[None]
    right, wrong = 40 * (target - 0.5), -40 * (target - 0.5)
    for kind in ("focal", "bce"):
        good, bad = (mask_loss_sums(x, target, np.array([True]), kind) for x in (right, wrong))
        assert float(good["pixels"][0]) < 1e-6 and float(good["dice"][0]) < 1e-5
        assert float(bad["pixels"][0]) > 5 and float(bad["dice"][0]) > 0.99


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="kind='unet'"):
        MaskDecoderConfig(kind="unet")
    with pytest.raises(ValueError, match="masks.num_heads must be a positive integer, not 0"):
        MaskDecoderConfig(num_heads=0)
    with pytest.raises(ValueError, match="multiple of 7 heads"):
        MaskDecoderConfig(width=64, num_heads=7)
    with pytest.raises(ValueError, match="focall"):
        mask_loss_sums(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)), np.array([True]), "focall")
    image, prompts = np.zeros((1, 15, 8), np.float32), np.zeros((1, 1, 8), np.float32)
    with pytest.raises(ValueError, match="15 image tokens"):
        MaskDecoder(SAM).init(jax.random.key(0), image, prompts)
    plain = MaskDecoderConfig(kind="published", width=32, num_heads=4, project_prompt=False)
    with pytest.raises(ValueError, match="prompts of width 8"):
        MaskDecoder(plain).init(jax.random.key(0), np.zeros((1, 16, 8), np.float32), prompts)
