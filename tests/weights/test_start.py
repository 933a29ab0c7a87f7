"""What a run starts from: rows by their tokens, an encoder over another model, other sizes."""

import dataclasses

import jax
import numpy as np
import pytest
from torch_models import ENCODER_WIDTH, PATCH, SIDE
from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

from rg_jax import run as run_lib
from rg_jax import start as start_lib
from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS, PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION
from rg_jax.model.paligemma import param_shapes
from rg_jax.weights import export
from rg_jax.weights.formats import open_weights
from rg_jax.weights.source import flatten
from rg_jax.weights.start import check_writes_alike, read_start
from rg_jax.weights.vocabulary import POSITIONS, TABLE, padded_rows


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def started(base, tokenizer, encoder=None, model=None, masks=None, seed=0):
    """(flat parameters, what was told) of a run with this tokenizer."""
    model = model or base.model
    model = model.replace(llm={"vocab_size": padded_rows(tokenizer.vocab_size)}, masks=masks)
    wanted, told = flatten(param_shapes(model)), []
    params = read_start(
        base,
        encoder,
        wanted,
        model=model,
        tokenizer=tokenizer,
        put=lambda name, array: array,
        seed=seed,
        tell=told.append,
    )
    assert all(params[n].shape == wanted[n].shape for n in params)
    return params, told


def test_the_rows_of_a_stock_folder(released, tokenizers):
    """64 rows of padding in the file are no tokens: ours start near the mean instead."""
    made, tokenizer = released["plain"], tokenizers["ours"]
    source = open_weights(str(made.folder))
    table = source.leaves[TABLE].stored()
    params, told = started(source, tokenizer)
    ours, base = params[TABLE], tokenizer.base_size
    np.testing.assert_array_equal(ours[:base], table[:base])
    assert (ours[base : tokenizer.vocab_size] != table[base : tokenizer.vocab_size]).any()
    assert not ours[tokenizer.vocab_size :].any()
    new = ours[base : tokenizer.vocab_size]
    assert np.abs(new - table[:base].mean(0)).max() < table[:base].std() * 0.6
    assert any("not used" in line for line in told), told
    for name, leaf in source.leaves.items():
        if name != TABLE:
            np.testing.assert_array_equal(params[name], leaf.stored(), err_msg=name)


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
@pytest.mark.parametrize("as_published", [True, False])
def test_extra_tokens_keep_their_rows_wherever_they_go(released, tokenizers, kind, as_published):
    made = released[kind]
    tokenizer = tokenizers[kind if as_published else "ours"]
    source = open_weights(str(made.folder))
    table = source.leaves[TABLE].stored()
    params, told = started(source, tokenizer, masks=source.masks)
    for token, row in zip(made.tokenizer.extra_tokens, made.tokenizer.extra_ids, strict=True):
        ours = tokenizer.extra_ids[tokenizer.extra_tokens.index(token)]
        np.testing.assert_array_equal(params[TABLE][ours], table[row], err_msg=token)
    base = tokenizer.base_size
    np.testing.assert_array_equal(params[TABLE][: base + 1], table[: base + 1])
    if as_published:  # every row is as it was, and nothing was made up
        np.testing.assert_array_equal(params[TABLE][: len(table)], table)
        assert not params[TABLE][len(table) :].any()
    assert ("masks/output_proj/kernel" in params) == (kind == "segmentation")
    without, told = started(source, tokenizer)
    assert not any(name.startswith("masks/") for name in without)
    assert ("its mask decoder is not used" in " ".join(told)) == (kind == "segmentation")


def test_a_run_and_its_folder_again_bit_for_bit(released, tokenizers, tmp_path):
    """Hugging Face → a run's parameters, padded → Hugging Face: what was read is written."""
    made = released["detection"]
    source = open_weights(str(made.folder))
    params, _ = started(source, made.tokenizer)
    rows = made.tokenizer.vocab_size
    assert len(params[TABLE]) > rows

    def leaf(name, array):
        array = array[:rows] if name == TABLE else array
        return dataclasses.replace(
            source.leaves[name], read=lambda dtype: array.astype(dtype), shape=array.shape
        )

    run = dataclasses.replace(source, leaves={n: leaf(n, x) for n, x in params.items()})
    export.to_folder(run, tmp_path / "out", made.tokenizer, show_progress=False)
    back = open_weights(str(tmp_path / "out"))
    assert back.fmt == PUBLISHED_DETECTION
    for name, first in source.leaves.items():
        np.testing.assert_array_equal(back.leaves[name].stored(), first.stored(), err_msg=name)


def test_formats_that_differ_are_an_error(released):
    source = open_weights(str(released["segmentation"].folder))
    check_writes_alike(source, PUBLISHED_SEGMENTATION, source.masks)
    check_writes_alike(open_weights(str(released["plain"].folder)), OURS, None)
    message = error_of(lambda: check_writes_alike(source, OURS, source.masks))
    assert "box_order 'xyxy' (config.grounding: 'yxyx')" in message
    assert "--config.weights_format=weights" in message
    other = dataclasses.replace(source.masks, depth=1)
    message = error_of(lambda: check_writes_alike(source, PUBLISHED_SEGMENTATION, other))
    assert "mask decoder 'published'" in message


def test_another_vocabulary_is_refused(released, tokenizers, tokenizer_file, tmp_path):
    from rg_jax.data.tokenizer import train_tokenizer

    train_tokenizer(["other words altogether"] * 9, tmp_path / "t", vocab_size=580, num_loc=16)
    other = Tokenizer.load(tmp_path / "t", ())
    source = open_weights(str(released["plain"].folder))
    message = error_of(lambda: started(source, other))
    assert "another tokenizer" in message and str(released["plain"].folder) in message
    source.tokens = None  # a file without a tokenizer: the number of rows tells
    cut = dataclasses.replace(source.leaves[TABLE], shape=(400, 24))
    source.leaves[TABLE] = dataclasses.replace(cut, read=lambda dtype: np.ones((400, 24), dtype))
    assert TABLE in error_of(lambda: started(source, tokenizers["ours"]))


@pytest.mark.parametrize("side", [20, 24])
def test_another_resolution_resizes_positions_of_every_format(released, tokenizers, tmp_path, side):
    made, tokenizer = released["plain"], tokenizers["plain"]
    source = open_weights(str(made.folder))
    export.to_npz(source, tmp_path / "w.npz", show_progress=False)
    found = []
    for spec in (made.folder, tmp_path / "w.npz"):
        base = open_weights(str(spec))
        params, told = started(base, tokenizer, model=base.model.replace(img={"image_size": side}))
        assert params[POSITIONS].shape == (1, (side // PATCH) ** 2, ENCODER_WIDTH)
        assert any("position embeddings are resized" in line for line in told)
        found.append(params[POSITIONS])
    np.testing.assert_array_equal(*found)
    assert "model needs" in error_of(
        lambda: started(source, tokenizer, model=source.model.replace(img={"patch_size": 6}))
    )


def siglip(folder, cls, kind):
    vision = {
        "hidden_size": ENCODER_WIDTH,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = {**vision, "vocab_size": 30, "max_position_embeddings": 8}
    text = {k: v for k, v in text.items() if k not in ("image_size", "patch_size")}
    if kind == "vision":
        config = SiglipVisionConfig(**vision)
    else:
        config = SiglipConfig(vision_config=vision, text_config=text)
    model = cls(config)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind, cls", [("vision", SiglipVisionModel), ("whole", SiglipModel)])
def test_a_siglip_folder_over_another_model(released, tokenizers, tmp_path, kind, cls):
    made = released["plain"]
    siglip(tmp_path / "siglip", cls, kind)
    encoder = open_weights(str(tmp_path / "siglip"))
    assert encoder.left_out and not encoder.unknown
    base = open_weights(str(made.folder))
    params, told = started(base, tokenizers["ours"], encoder=encoder)
    for name, leaf in base.leaves.items():
        other = encoder.leaves.get(name)
        assert (other is not None) == (name.startswith("img/") and "/head/" not in name)
        expected = (other or leaf).stored()
        if name != TABLE:
            np.testing.assert_array_equal(params[name], expected, err_msg=name)
    assert any("left out" in line for line in told), told


def test_siglip_in_flax_form_layers_apart(released, tmp_path):
    """Original SigLIP files: encoderblock_0, …; text tower and attention pool are left out."""
    source = open_weights(str(released["plain"].folder))
    arrays = {}
    for name, leaf in source.only("img").leaves.items():
        if "/head/" in name:
            continue
        if "/encoderblock/" in name:
            for i, layer in enumerate(leaf.stored()):
                arrays["params/" + name.replace("encoderblock", f"encoderblock_{i}")] = layer
        else:
            arrays[f"params/{name}"] = leaf.stored()
    more = {"img/MAPHead_0/probe": (1, 1, 16), "txt/head/kernel": (3, 3), "t": (1,), "b": (1,)}
    arrays |= {f"params/{name}": np.ones(shape, np.float32) for name, shape in more.items()}
    np.savez(tmp_path / "siglip.npz", **arrays)
    encoder = open_weights(f"{tmp_path}/siglip.npz:img")
    assert len(encoder.left_out) == 4 and not encoder.unknown
    assert encoder.leaves.keys() == {
        n for n in source.leaves if n.startswith("img/") and "/head/" not in n
    }
    for name, leaf in encoder.leaves.items():
        np.testing.assert_array_equal(leaf.stored(), source.leaves[name].stored(), err_msg=name)
    gone = next(key for key in arrays if "encoderblock_1" in key)
    np.savez(tmp_path / "gone.npz", **{k: v for k, v in arrays.items() if k != gone})
    lacking = open_weights(f"{tmp_path}/gone.npz:img").missing
    assert list(lacking.values()) == [[gone]]


def test_parts_of_an_npz(released, tokenizers, tmp_path):
    source = open_weights(str(released["plain"].folder))
    export.to_npz(source, tmp_path / "w.npz", show_progress=False)
    for part in ("img", "llm"):
        only = open_weights(f"{tmp_path}/w.npz:{part}")
        params, _ = started(only, tokenizers["plain"], model=source.model)
        assert {name.split("/")[0] for name in params} == {part}
        assert len(params) == sum(name.startswith(f"{part}/") for name in source.leaves)
    assert "'text'" in error_of(lambda: open_weights(f"{tmp_path}/w.npz:text"))
    assert "no such weights file" in error_of(lambda: open_weights(f"{tmp_path}/none.npz:img"))


def test_a_whole_file_has_to_hold_all_of_it(released, tokenizers, tmp_path):
    """Nothing begins at random because a file lacks it, unless one part was asked for."""
    source = open_weights(str(released["plain"].folder))
    export.to_npz(source.only("llm"), tmp_path / "half.npz", show_progress=False)
    half = open_weights(str(tmp_path / "half.npz"))
    message = error_of(lambda: started(half, tokenizers["plain"], model=source.model))
    assert "missing: params/img/" in message
    np.savez(tmp_path / "bare.npz", **{n: leaf.stored() for n, leaf in source.leaves.items()})
    bare = open_weights(str(tmp_path / "bare.npz"))
    message = error_of(lambda: started(bare, tokenizers["plain"], model=source.model))
    assert "without the leading 'params/'" in message
    text = open_weights(f"{tmp_path}/half.npz:llm")
    message = error_of(
        lambda: started(source, tokenizers["plain"], encoder=text, model=source.model)
    )
    assert "missing: params/img/" in message


def test_an_encoder_alone_leaves_the_rest_to_chance(released, tokenizers, tmp_path):
    siglip(tmp_path / "siglip", SiglipVisionModel, "vision")
    encoder = open_weights(str(tmp_path / "siglip"))
    model = open_weights(str(released["plain"].folder)).model
    params, _ = started(encoder, tokenizers["plain"], model=model)
    assert params.keys() == encoder.leaves.keys()
    assert not any(name.startswith(("llm/", "img/head/")) for name in params)


@pytest.mark.parametrize(
    "make, culprit",
    [
        (lambda p: (p / "x.h5").write_text("x"), "x.h5: unknown kind"),
        (lambda p: (p / "x.h5").mkdir(), "config.json"),
        (lambda p: None, "there are no such weights"),
    ],
)
def test_what_is_no_weights_is_named(tmp_path, make, culprit):
    make(tmp_path)
    assert culprit in error_of(lambda: open_weights(str(tmp_path / "x.h5")))


def config_of(tiny_config, released, kind, **changes):
    made = released[kind]
    config = tiny_config("/nonexistent", weights=str(made.folder), **changes)
    llm = dataclasses.asdict(open_weights(str(made.folder)).model.llm)
    del llm["vocab_size"]
    config.model.image_size = SIDE
    config.model.img = {"patch_size": PATCH, "width": ENCODER_WIDTH, "mlp_dim": 20, "depth": 2}
    config.model.img.num_heads = 2
    config.model.llm = llm
    return config


def test_a_run_starts_from_a_released_model(released, tokenizers, tiny_config):
    """Through the config: first refused, then as the weights are; one leaf after the other."""
    made = released["segmentation"]
    config = config_of(tiny_config, released, "segmentation")
    config.masks.kind = "sam"
    fmt = run_lib.grounding_format(config)
    run = run_lib.assemble(config, fmt, tokenizers["ours"], 12)
    message = error_of(lambda: start_lib.first_state(run))
    assert "--config.weights_format=weights" in message and "mask decoder" in message

    config.weights_format = "weights"
    start_lib.adopt_format(config)
    fmt = run_lib.grounding_format(config)
    assert fmt == PUBLISHED_SEGMENTATION and config.masks.kind == "published"
    assert (config.masks.width, config.masks.slots) == (24, 8)
    run = run_lib.assemble(config, fmt, tokenizers["segmentation"], 12)
    state = start_lib.first_state(run)
    held = {**state.trainable, **state.frozen}
    source = open_weights(str(made.folder))
    for name, leaf in source.leaves.items():
        array = np.asarray(held[name])[: leaf.shape[0]]
        np.testing.assert_array_equal(array, leaf.stored(), err_msg=name)

    config.weights_format, config.grounding = "config", tiny_config("/x").grounding
    config.masks.kind = ""
    run = run_lib.assemble(config, run_lib.grounding_format(config), tokenizers["ours"], 12)
    state = start_lib.first_state(run)
    assert not any(name.startswith("masks/") for name in {**state.trainable, **state.frozen})


def test_a_run_with_other_arithmetic_is_refused(released, tokenizers, tiny_config):
    config = config_of(tiny_config, released, "plain")
    config.model.llm.attn_softcap = 30.0
    fmt = run_lib.grounding_format(config)
    run = run_lib.assemble(config, fmt, tokenizers["ours"], 12)
    assert "llm.attn_softcap=50.0" in error_of(lambda: start_lib.first_state(run))


def test_places_and_leaves(released, tokenizers):
    """Every leaf is put as soon as it is read, and none is kept."""
    source = open_weights(str(released["plain"].folder))
    events = []
    watched = {
        name: dataclasses.replace(
            leaf,
            read=lambda dtype, leaf=leaf, name=name: (events.append(name), leaf.read(dtype))[1],
        )
        for name, leaf in source.leaves.items()
    }
    source = dataclasses.replace(source, leaves=watched)
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, np.float32) for name, leaf in watched.items()}
    wanted[TABLE] = jax.ShapeDtypeStruct((padded_rows(tokenizers["plain"].vocab_size), 24), "f4")
    read_start(
        source,
        None,
        wanted,
        model=source.model,
        tokenizer=tokenizers["plain"],
        put=lambda name, array: events.append(f"put {name}"),
        seed=0,
        tell=lambda line: None,
    )
    assert events[1::2] == [f"put {name}" for name in events[::2]] and len(events) == 2 * len(
        wanted
    )
