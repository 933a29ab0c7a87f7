"""Any weights that a user can name, recognised and opened.

weights/paligemma2-3b-pt-224.b16.npz    the original Flax file; `FILE.npz:img`, `FILE.npz:llm`:
                                        one part of it
FOLDER                                  Hugging Face: PaliGemma 2, the released RadGrounder,
                                        SigLIP; or the folder of a training run of ours
FILE.ckpt                               the published adapted SigLIP
"""

from __future__ import annotations

from pathlib import Path

from rg_jax.data.tokenizer import Tokenizer
from rg_jax.errors import UserError
from rg_jax.weights import encoders, hf_config, huggingface
from rg_jax.weights.hf_tokenizer import TOKENIZER_MODEL, tokens_of
from rg_jax.weights.npz import open_npz
from rg_jax.weights.source import Source

PARTS = ("img", "llm")
# What lies beside a `.npz` of ours: NAME.grounding_format.json, NAME.tokenizer.model, …
NPZ_FORMAT, NPZ_TOKENIZER, NPZ_MASKS, NPZ_MASKS_CONFIG = (
    f".{name}"
    for name in (
        huggingface.FORMAT_FILE,
        TOKENIZER_MODEL,
        huggingface.MASKS_FILE,
        huggingface.MASKS_CONFIG,
    )
)


def split_part(spec: str) -> tuple[Path, str | None]:
    """`FILE.npz:img` → (FILE.npz, "img"); without a part (spec, None). Raises UserError."""
    head, colon, part = spec.rpartition(":")
    if not colon or not head.endswith(".npz"):
        return Path(spec), None
    if part not in PARTS:
        raise UserError(f"{spec}: no part {part!r} in such a file; known are {', '.join(PARTS)}")
    return Path(head), part


def open_weights(spec: str, *, num_heads: int | None = None) -> Source:
    """What `spec` names, from headers alone. `num_heads`: of an encoder that does not say it.

    Raises UserError for what is not there, not known or not whole.
    """
    path, part = split_part(spec)
    if path.suffix == ".npz":
        source = _open_npz(path)
        source.path = spec
        if part is None:
            return source
        chosen = source.only(part)
        if not chosen.leaves:
            raise UserError(f"{spec}: the file has no {part}/…")
        return chosen
    if path.is_dir():
        return _open_folder(path)
    if path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        if not path.is_file():
            raise UserError(f"{path}: there is no such weights file.")
        return encoders.open_checkpoint(path, num_heads)
    if path.exists():
        raise UserError(
            f"{path}: unknown kind of weights; known are .npz, .ckpt and folders of Hugging Face"
        )
    raise UserError(f"{path}: there are no such weights.")


def _open_npz(path: Path) -> Source:
    source = open_npz(path)
    shapes = {name: leaf.shape for name, leaf in source.leaves.items()}
    source.model = hf_config.config_of_shapes(shapes)
    source.fmt = huggingface.read_format(path.with_suffix(NPZ_FORMAT))
    # Without a format beside it, whether rows behind the pieces are tokens is not known.
    source.extra_tokens = source.fmt.extra_tokens if source.fmt else None
    beside = (path.with_suffix(NPZ_TOKENIZER), path.with_name("paligemma_tokenizer.model"))
    source.tokenizer_model = next((file for file in beside if file.is_file()), None)
    if source.tokenizer_model == path.with_suffix(NPZ_TOKENIZER):
        tokenizer = Tokenizer.load(source.tokenizer_model, source.extra_tokens or ())
        source.tokens = tokens_of(tokenizer)
    masks = path.with_suffix(NPZ_MASKS)
    if masks.is_file():
        huggingface.read_masks(source, masks, path.with_suffix(NPZ_MASKS_CONFIG))
    return source


def _open_folder(path: Path) -> Source:
    if (path / "checkpoints").is_dir():
        # A run is described above this package, which otherwise knows nothing of runs.
        from rg_jax.weights.run_folder import open_run_folder

        return open_run_folder(path)
    config = hf_config.read_json(path / hf_config.CONFIG)
    if config.get("model_type") == "paligemma":
        return huggingface.open_folder(path)
    return encoders.open_siglip(path)
