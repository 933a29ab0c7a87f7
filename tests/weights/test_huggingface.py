"""Hugging Face folders, the released models among them: what `transformers` saves and computes."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from torch_models import MaskHead, forward

from rg_jax.errors import UserError
from rg_jax.grounding.format import PUBLISHED_DETECTION, PUBLISHED_SEGMENTATION
from rg_jax.model.paligemma import PaliGemma, apply
from rg_jax.weights.formats import open_weights
from rg_jax.weights.hf_tokenizer import check_same
from rg_jax.weights.source import problems

NAMED = {"detection": PUBLISHED_DETECTION, "segmentation": PUBLISHED_SEGMENTATION}


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def copied(released, tmp_path):
    return shutil.copytree(released.folder, tmp_path / "copy")


def tensors(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def save(folder, arrays):
    from safetensors.numpy import save_file

    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["plain", "detection", "segmentation"])
def test_a_folder_computes_what_torch_computes(released, kind, params_of, our_forward, inputs):
    made = released[kind]
    source = open_weights(str(made.folder))
    assert source.extra_tokens == made.tokenizer.extra_tokens and source.fmt == NAMED.get(kind)
    assert not source.unknown and not source.missing
    model, params = params_of(source)
    image, text, mask_ar = inputs(made.tokenizer)
    ours = our_forward(model, params, image, text, mask_ar)
    logits, hidden = forward(made.model, image, text, mask_ar, made.tokenizer.image_id)
    assert np.abs(logits).max() > 0.5
    np.testing.assert_allclose(ours["logits"], logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours["hidden"], hidden, rtol=0, atol=1e-5)
    assert (source.masks is not None) == (kind == "segmentation")


def test_the_masks_of_a_released_segmentation_model(released, params_of, our_forward, inputs):
    made = released["segmentation"]
    model, params = params_of(open_weights(str(made.folder)))
    assert model.masks.kind == "published" and not model.masks.project_prompt
    assert (model.masks.width, model.masks.num_heads, model.masks.depth) == (24, 8, 2)
    image, text, mask_ar = inputs(made.tokenizer)
    ours = our_forward(model, params, image, text, mask_ar)
    at = image.shape[1] // 4 * (image.shape[2] // 4) + 6  # the </seg> of the texts
    assert (text[:, 6] == made.tokenizer.extra_ids[1]).all()
    masks = apply(
        PaliGemma(model),
        params,
        ours["image_features"],
        ours["hidden"][:, at : at + 1],
        method="decode_masks",
    )
    _, hidden = forward(made.model, image, text, mask_ar, made.tokenizer.image_id)
    with torch.no_grad():
        tower = made.model.model.vision_tower(torch.tensor(image.transpose(0, 3, 1, 2)))
        expected = made.model.segmentation_head(
            tower.last_hidden_state, torch.tensor(hidden[:, at])
        )
    assert expected.std() > 0.01
    np.testing.assert_allclose(np.asarray(masks), expected.numpy(), rtol=0, atol=1e-5)


def test_golden_mask_decoder_is_the_torch_module_of_these_tests(golden):
    """The head above stands for the released one: names, shapes and numbers."""
    with np.load(golden / "mask_decoder.npz") as file:
        held = {key: file[key] for key in file.files}
    meta = json.loads(str(held["meta_json"]))
    cases = sorted({key.split("/")[0] for key in held if "/" in key})
    assert cases
    for case in cases:
        m = meta[case]
        head = MaskHead(m["img"], m["proj"], m["heads"], m["layers"], m["classes"])
        weights = {k: v for k, v in held.items() if k.startswith(f"{case}/w/")}
        state = {k.split("/w/")[1]: torch.tensor(v) for k, v in weights.items()}
        if state["transformer.layers.0.mlp.0.weight"].shape[0] != 4 * m["proj"]:
            continue  # this stand-in has the released proportions
        head.load_state_dict(state)
        with torch.no_grad():
            logits = head(
                torch.tensor(held[f"{case}/in/image_feats"]),
                torch.tensor(held[f"{case}/in/p_end_embed"]),
            )
        tolerance = max(2e-5, 5 * m["max_abs_diff_float32_vs_float64"])
        np.testing.assert_allclose(logits, held[f"{case}/out/logits16"], rtol=0, atol=tolerance)


def same_leaves(one, other):
    assert one.leaves.keys() == other.leaves.keys()
    for name, leaf in one.leaves.items():
        np.testing.assert_array_equal(leaf.stored(), other.leaves[name].stored(), err_msg=name)


def respelled(key):
    """The names that the library uses in memory, and for its newer files."""
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower.vision_model."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def test_both_spellings_and_the_old_file_format(released, tmp_path):
    made = released["plain"]
    source = open_weights(str(made.folder))
    arrays = tensors(made.folder)
    assert all(respelled(key) != key for key in arrays)

    other = copied(made, tmp_path)
    buffer = {"vision_tower.vision_model.embeddings.position_ids": np.arange(9)}
    save(other, {**{respelled(key): array for key, array in arrays.items()}, **buffer})
    same_leaves(open_weights(str(other)), source)

    (other / "model.safetensors").unlink()
    state = {key: torch.tensor(array) for key, array in arrays.items()}
    state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    torch.save(state, other / "pytorch_model.bin")
    same_leaves(open_weights(str(other)), source)

    keys = sorted(state)
    shards = {
        "pytorch_model-00001-of-00002.bin": keys[::2],
        "pytorch_model-00002-of-00002.bin": keys[1::2],
    }
    for name, held in shards.items():
        torch.save({key: state[key] for key in held}, other / name)
    (other / "pytorch_model.bin").unlink()
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    (other / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    same_leaves(open_weights(str(other)), source)


def test_an_output_of_its_own_is_another_model(released, tmp_path):
    other = copied(released["plain"], tmp_path)
    arrays = tensors(other)
    arrays["lm_head.weight"] = arrays["language_model.model.embed_tokens.weight"] + 1
    save(other, arrays)
    assert "lm_head.weight differs" in error_of(lambda: open_weights(str(other)))


def test_shards_that_are_not_whole(released, tmp_path):
    made = released["detection"]
    shards = sorted(made.folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    other = copied(made, tmp_path)
    index = other / "model.safetensors.index.json"
    places = json.loads(index.read_text())

    whole = (other / shards[1].name).read_bytes()
    (other / shards[1].name).write_bytes(whole[:-100])
    message = error_of(lambda: open_weights(str(other)))
    assert shards[1].name in message and "cut short" in message
    (other / shards[1].name).unlink()
    assert f"not there: {shards[1].name}" in error_of(lambda: open_weights(str(other)))
    (other / shards[1].name).write_bytes(whole)

    first, second = (
        next(k for k, v in places["weight_map"].items() if v == shard.name) for shard in shards[:2]
    )
    swapped = {**places["weight_map"], first: shards[1].name, second: shards[0].name}
    index.write_text(json.dumps({"weight_map": swapped}))
    message = error_of(lambda: open_weights(str(other)))
    assert f"{first} in {shards[1].name}" in message

    index.unlink()
    message = error_of(lambda: open_weights(str(other)))
    assert "model.safetensors.index.json" in message and shards[0].name in message


def test_missing_unknown_and_misshapen_keys_are_named(released, tmp_path):
    other = copied(released["plain"], tmp_path)
    arrays = tensors(other)
    gone = "language_model.model.layers.1.self_attn.v_proj.weight"
    more = "language_model.model.layers.2.mlp.up_proj.weight"
    changed = {k: v for k, v in arrays.items() if k != gone}
    changed |= {more: arrays[more.replace("2", "1")], "audio_tower.weight": np.ones(3, np.float32)}
    save(other, changed)
    source = open_weights(str(other))
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, np.float32)
        for name, leaf in open_weights(str(released["plain"].folder)).leaves.items()
    }
    text = "; ".join(problems(source, wanted))
    assert f"missing: {gone}" in text and more in text and "audio_tower.weight" in text

    wrong = "language_model.model.layers.0.mlp.up_proj.weight"
    save(other, {**arrays, wrong: arrays[wrong].T})
    message = error_of(lambda: open_weights(str(other)))
    assert wrong in message and "(24, 40)" in message

    save(other, {**arrays, respelled(wrong): arrays[wrong]})
    assert "are the same parameter" in error_of(lambda: open_weights(str(other)))


@pytest.mark.parametrize(
    "part, field, value, culprit",
    [
        ("text_config", "model_type", "gemma", "gemma2"),
        ("text_config", "query_pre_attn_scalar", 7, "query_pre_attn_scalar"),
        ("text_config", "hidden_activation", "gelu", "hidden_activation"),
        ("vision_config", "hidden_act", "gelu", "hidden_act"),
        ("vision_config", "image_size", 13, "multiple"),
        (None, "model_type", "llava", "llava"),
        (None, "image_token_index", 5, "<image>"),
    ],
)
def test_another_architecture_is_refused(released, tmp_path, part, field, value, culprit):
    other = copied(released["plain"], tmp_path)
    config = json.loads((other / "config.json").read_text())
    (config if part is None else config[part])[field] = value
    (other / "config.json").write_text(json.dumps(config))
    message = error_of(lambda: open_weights(str(other)))
    assert culprit in message and str(other) in message


def test_sparse_configs_mean_the_librarys_defaults(released, tmp_path):
    other = copied(released["plain"], tmp_path)
    config = json.loads((other / "config.json").read_text())
    for name in ("attn_logit_softcapping", "rms_norm_eps", "sliding_window", "rope_parameters"):
        del config["text_config"][name]
    config["text_config"]["final_logit_softcapping"] = 30.0
    (other / "config.json").write_text(json.dumps(config))
    source = open_weights(str(other))
    assert source.model == open_weights(str(released["plain"].folder)).model
    assert source.model.llm.final_softcap is None and "30" in source.notes[-1]


def test_extra_tokens_are_found_in_whatever_files_there_are(released, tmp_path):
    other = copied(released["detection"], tmp_path)
    tokens = json.loads((other / "tokenizer.json").read_text())["added_tokens"]
    (other / "tokenizer.json").unlink()
    assert open_weights(str(other)).extra_tokens is None
    added = {token["content"]: token["id"] for token in tokens}
    (other / "added_tokens.json").write_text(json.dumps(added))
    assert open_weights(str(other)).fmt == PUBLISHED_DETECTION
    (other / "added_tokens.json").unlink()
    decoder = {str(token["id"]): {"content": token["content"]} for token in tokens}
    (other / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert open_weights(str(other)).fmt == PUBLISHED_DETECTION

    decoder[str(tokens[-1]["id"] + 1)] = {"content": "<tool>"}
    (other / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert "<tool>" in error_of(lambda: open_weights(str(other)))
    del decoder[str(tokens[-1]["id"] + 1)], decoder[str(tokens[1]["id"])]
    (other / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert "not in a row" in error_of(lambda: open_weights(str(other)))


def test_another_tokenizer_is_refused(released, tokenizers):
    made = released["detection"]
    tokens = open_weights(str(made.folder)).tokens
    check_same("w", tokens, tokenizers["detection"])
    check_same("w", tokens, tokenizers["ours"])
    swapped = dict(tokens)
    swapped["<loc0000>"], swapped["<loc0001>"] = swapped["<loc0001>"], swapped["<loc0000>"]
    assert "<loc0000>" in error_of(lambda: check_same("w", swapped, tokenizers["ours"]))
    last = tokenizers["ours"].base_size - 1
    renamed = {("Lunge" if i == last else t): i for t, i in tokens.items()}
    assert f"'Lunge' as token {last}" in error_of(
        lambda: check_same("w", renamed, tokenizers["ours"])
    )
