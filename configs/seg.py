"""Grounded reports with masks: the segmentation recipe of the RadGrounder paper, built right.

    python -m rg_jax.train --config=configs/seg.py                 PaliGemma 2 3B on your RefRad2D
    python -m rg_jax.train --config=configs/seg.py:slake           the same on SLAKE
    python -m rg_jax.train --config=configs/seg.py:slake,tiny      a tiny model on SLAKE, CPU
    python -m rg_jax.train --config=configs/seg.py:demo            a tiny model on phantoms, CPU

The paper reports a G-IoU of 36.9 for masks. `decoder=published` trains the published form of the
mask decoder instead of ours; `only_decoder=true` trains nothing else. Masks weigh λ = 1 in the loss
(`--config.masks.weight`): the published code says 0.1, but adds up what 12 micro-batches give.
"""

from rg_jax import recipes
from rg_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, **recipes.MASK_ARGS)
    c = recipes.base()
    c.seed = arg.seed
    if arg.demo:
        recipes.check_tiny(arg)
        c.name = "seg:demo"
        tasks = {"segment": 0.65, "segment_vqa": 0.25, "report": 0.05, "vqa": 0.05}
        recipes.phantom_demo(c, tasks, test="segment", text_len=64)
        c.total_steps = arg.steps or 1500
        recipes.tiny_masks(c, slots=5)
    else:
        c.name = "seg" + (":slake" if arg.slake else "") + (",tiny" if arg.tiny else "")
        recipes.paper_masks(c, arg, "segment")
    return recipes.mask_decoder(recipes.adapted(c, arg), arg)
