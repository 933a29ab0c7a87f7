"""Grounding and questions on SLAKE 1.0, the public set with questions, boxes and masks.

    python -m tfds_builders slake --source=DIR --data_dir=data
    python -m rg_jax.train --config=configs/slake.py               PaliGemma 2 3B
    python -m rg_jax.train --config=configs/slake.py:tiny          a tiny model from scratch, CPU

SLAKE's own questions and template questions about the structures on the picture, English, by the
official split (disjoint by image). The paper's models reach F1 87.7 on its open questions and an
accuracy of 90.3 on its closed ones (validation split; see the README on what that means). The tiny
model shows that the path from real slices to a report page works; it is too small to be good.
"""

from rg_jax import recipes
from rg_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg, tiny=False, steps=0, variant="3b", image_size=224, seed=0, **recipes.ADAPT_ARGS
    )
    c = recipes.base()
    c.seed = arg.seed
    recipes.slake(c, {"slake": 0.5, "detect_vqa": 0.5})
    if arg.tiny:
        recipes.check_tiny(arg)
        c.name = "slake:tiny"
        recipes.slake_tiny(c)
        c.total_steps = arg.steps or c.total_steps
        return recipes.adapted(c, arg)
    c.name = "slake"
    recipes.paper(c, arg.variant, arg.image_size)
    # A small set: smaller batches, more epochs, the encoder learns too (SLAKE is not RefRad2D).
    c.batch_size, c.accumulation = 32, 2
    c.total_epochs, c.total_steps = (None, arg.steps) if arg.steps else (10, None)
    c.schedule = [(".*", {"decay": "cosine", "warmup_percent": 10})]
    c.eval.every_steps = 500
    return recipes.adapted(c, arg)
