"""Out and back: bit for bit between formats, and what stock `transformers` makes of our folders."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from torch_models import forward
from transformers import AutoProcessor, AutoTokenizer, PaliGemmaForConditionalGeneration

from rg_jax.data.tokenizer import PALIGEMMA_SHA256
from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS
from rg_jax.model.generate import generate
from rg_jax.model.paligemma import PaliGemma
from rg_jax.weights import export
from rg_jax.weights.formats import open_weights
from rg_jax.weights.hf_tokenizer import check_known, write_tokenizer
from rg_jax.weights.source import BF16, Leaf
from rg_jax.weights.vocabulary import TABLE


def folder_of(source, path, tokenizer, **options):
    export.to_folder(source, path, tokenizer, show_progress=False, **options)
    return path


def npz_of(source, path, **options):
    export.to_npz(source, path, show_progress=False, **options)
    return path


def raw(folder):
    """Every tensor of a folder, as bytes."""
    from safetensors.numpy import load_file

    held = {}
    for path in folder.glob("*.safetensors"):
        if path.name != "mask_decoder.safetensors":
            held |= load_file(path)
    return {key: (array.shape, array.dtype.name, array.tobytes()) for key, array in held.items()}


def short(key):
    """The same for every spelling of the library."""
    key = key.removeprefix("model.")
    for part, rest in (("language_model.", "model."), ("vision_tower.", "vision_model.")):
        if key.startswith(part):
            key = part + key.removeprefix(part).removeprefix(rest)
    return key


def without_masks(held):
    return {short(k): v for k, v in held.items() if not k.startswith("segmentation_head")}


@pytest.mark.parametrize("kind", ["plain", "detection", "segmentation"])
def test_there_and_back_bit_for_bit(released, tmp_path, kind):
    """Hugging Face → .npz → Hugging Face, and .npz → Hugging Face → .npz: rows of padding too."""
    made = released[kind]
    source = open_weights(str(made.folder))
    npz = npz_of(source, tmp_path / "w.npz")
    back = open_weights(str(npz))
    assert back.fmt == source.fmt and back.masks == source.masks
    assert back.leaves[TABLE].shape == source.leaves[TABLE].shape
    folder = folder_of(back, tmp_path / "back", made.tokenizer, max_shard=30_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert without_masks(raw(folder)) == without_masks(raw(made.folder))
    again = npz_of(open_weights(str(folder)), tmp_path / "again.npz")
    with np.load(npz) as one, np.load(again) as other:
        assert set(one.files) == set(other.files)
        for key in one.files:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    if kind == "segmentation":
        one, other = (open_weights(str(path)) for path in (made.folder, folder))
        heads = [name for name in one.leaves if name.startswith("masks/")]
        assert heads
        for name in heads:
            np.testing.assert_array_equal(one.leaves[name].stored(), other.leaves[name].stored())


def test_bfloat16_there_and_back(released, tmp_path):
    made = released["plain"]
    half = npz_of(open_weights(str(made.folder)), tmp_path / "h.npz", dtype="bfloat16")
    with np.load(half) as file:
        assert {array.dtype for array in file.values()} == {np.dtype("V2")}
    folder = folder_of(open_weights(str(half)), tmp_path / "f", made.tokenizer)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    again = npz_of(open_weights(str(folder)), tmp_path / "again.npz")
    with np.load(half) as one, np.load(again) as other:
        for key in one.files:
            assert one[key].tobytes() == other[key].tobytes(), key
    wide = folder_of(open_weights(str(half)), tmp_path / "w", made.tokenizer, dtype="float32")
    assert {kind for _, kind, _ in raw(wide).values()} == {"float32"}


class Exported:
    """A folder of ours, its source, and what `transformers` loads from it."""

    def __init__(self, source, tokenizer, path):
        self.source, self.tokenizer, self.path = source, tokenizer, path
        folder_of(source, path, tokenizer)
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(
            path, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def exported(released, tokenizers, tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    plain = open_weights(str(released["plain"].folder))
    # Our own tokens on top: rows that no other model has.
    grown = open_weights(str(released["plain"].folder))
    rows, table = tokenizers["ours"].vocab_size, plain.leaves[TABLE]
    cut = Leaf((rows, *table.shape[1:]), table.dtype, lambda dtype: table.read(dtype)[:rows])
    grown.leaves = {**grown.leaves, TABLE: cut}
    grown.model = grown.model.replace(llm={"vocab_size": rows})
    grown.fmt, grown.extra_tokens, grown.tokens = OURS, OURS.extra_tokens, None
    return {
        "plain": Exported(plain, tokenizers["plain"], root / "plain"),
        "ours": Exported(grown, tokenizers["ours"], root / "ours"),
    }


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_transformers_computes_our_logits(exported, kind, params_of, our_forward, inputs):
    made = exported[kind]
    assert made.model.config.text_config.final_logit_softcapping is None
    text = json.loads((made.path / "config.json").read_text())["text_config"]
    assert "final_logit_softcapping" in text and text["final_logit_softcapping"] is None
    model, params = params_of(made.source)
    image, text, mask_ar = inputs(made.tokenizer)
    ours = our_forward(model, params, image, text, mask_ar)
    logits, _ = forward(made.model, image, text, mask_ar, made.tokenizer.image_id)
    np.testing.assert_allclose(ours["logits"], logits, rtol=0, atol=1e-5)
    # Without token types the library reads the prefix causally: the difference can be seen.
    causal, _ = forward(made.model, image, text, np.ones_like(mask_ar), made.tokenizer.image_id)
    assert np.abs(causal - logits).max() > 1e-2


@pytest.mark.parametrize("kind", ["plain", "ours"])
def test_transformers_writes_our_text(exported, kind, params_of):
    """A picture and a prompt through the library's processor, and through ours."""
    from PIL import Image

    made = exported[kind]
    model, params = params_of(made.source)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    prompt = "\nlarge liver\nCaption this image and detect keywords: "
    batch = made.processor(
        images=Image.fromarray(pixels), text="<image>" + prompt, return_tensors="pt"
    )
    given = [made.tokenizer.bos_id, *made.tokenizer.encode(prompt + "\n")]
    assert batch["input_ids"][0, model.img.num_tokens :].tolist() == given
    image = pixels[None].astype(np.float32) / 127.5 - 1
    theirs = batch["pixel_values"].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(theirs, image, atol=1e-5)
    batch.pop("labels", None)
    with torch.no_grad():
        out = made.model.generate(**batch, max_new_tokens=12, do_sample=False)
    theirs = out[0, batch["input_ids"].shape[1] :].tolist()
    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            lambda p, x, t: generate(
                PaliGemma(model), p, x, t, max_new_tokens=12, eos_id=made.tokenizer.eos_id
            )
        )
        ours = np.asarray(run(params, image, np.asarray([given], np.int32)))[0].tolist()
    ours, theirs = (x[: x.index(1)] if 1 in x else x for x in (ours, theirs))
    assert ours == theirs and len(ours) > 2
    table = made.processor.tokenizer
    known = [i for i in ours if i < made.tokenizer.vocab_size and i != made.tokenizer.image_id]
    assert table.decode(known) == made.tokenizer.decode(known)


def test_the_tokenizer_is_ours(tokenizers, tmp_path):
    tokenizer = tokenizers["ours"]
    write_tokenizer(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    for token, i in zip(tokenizer.extra_tokens, tokenizer.extra_ids, strict=True):
        assert theirs.convert_tokens_to_ids(token) == i
    assert theirs.convert_tokens_to_ids("<image>") == tokenizer.image_id
    assert theirs.convert_tokens_to_ids("<loc0000>") == tokenizer.loc_ids[0]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)
    for text in (
        "Caption this image and detect keywords: liver",
        "\n\nGröße der Leber \n",
        "<p bbox=<loc0001><loc0002><loc0003><loc0004> id=<seg005>>large liver</p>, <seg>x</seg>.",
        "a  b   c    d\n\n\nunbekannt: Ω 😀 \t tab",
        " leading and trailing ",
    ):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text), text
        assert theirs.decode(ids) == text
    assert theirs("liver")["input_ids"][0] == tokenizer.bos_id


def test_the_card_says_what_matters(exported):
    card = (exported["ours"].path / "README.md").read_text()
    for part in ("Not a medical device", "<p bbox=", "y_min x_min", "512 bins", "token_type_ids"):
        assert part in card, part
    assert str(exported["ours"].path.parent) not in card
    assert (exported["ours"].path / "grounding_format.json").is_file()
    assert not (exported["plain"].path / "grounding_format.json").exists()


def test_nothing_half_written(released, tmp_path):
    made = released["plain"]
    source = open_weights(str(made.folder))

    def fail(dtype):
        raise OSError(28, "No space left on device")

    last = "llm/layers/post_ffw_norm/scale"
    broken = Leaf(source.leaves[last].shape, source.leaves[last].dtype, fail)
    source.leaves = {**source.leaves, last: broken}
    with pytest.raises(OSError):
        folder_of(source, tmp_path / "out", made.tokenizer)
    with pytest.raises(OSError):
        npz_of(source, tmp_path / "out.npz")
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or path.stem == "out"]
    (tmp_path / "there").mkdir()
    whole = open_weights(str(made.folder))
    with pytest.raises(UserError, match="exists already"):
        folder_of(whole, tmp_path / "there", made.tokenizer)


def test_what_does_not_belong_together_is_refused(released, tokenizers, tmp_path):
    source = open_weights(str(released["detection"].folder))
    with pytest.raises(UserError, match="they do not belong together"):
        folder_of(source, tmp_path / "x", tokenizers["ours"])
    plain = open_weights(str(released["plain"].folder))
    del plain.leaves["img/head/bias"]
    with pytest.raises(UserError, match="missing: img/head/bias"):
        folder_of(plain, tmp_path / "x", tokenizers["plain"])
    with pytest.raises(UserError, match="--dtype=int8"):
        export.common_dtype([], "int8")
    for text in ("5", "GB", "0GB", "5TB"):
        with pytest.raises(UserError, match="--max_shard"):
            export.parse_size(text)
    assert export.parse_size("500MB") == 500_000_000 and export.DTYPES["bfloat16"] == BF16


def test_a_tokenizer_of_another_hash_is_refused(tokenizers):
    """Of PaliGemma's size there are two files; whatever else has that size is a wrong one."""
    check_known(tokenizers["ours"])
    fake = copy.copy(tokenizers["ours"])
    fake.base_size = 257_152
    with pytest.raises(UserError, match=f"sha256 {fake.sha256}"):
        check_known(fake)
    fake.sha256 = PALIGEMMA_SHA256
    check_known(fake)
