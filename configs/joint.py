"""One model that answers with a box and a mask for the same mention, or with one of them.

    python -m rg_jax.train --config=configs/joint.py               PaliGemma 2 3B on your RefRad2D
    python -m rg_jax.train --config=configs/joint.py:slake         the same on SLAKE
    python -m rg_jax.train --config=configs/joint.py:slake,tiny    a tiny model on SLAKE, CPU
    python -m rg_jax.train --config=configs/joint.py:demo          a tiny model on phantoms, CPU

The prompt decides: "detect", "segment", or "detect and segment" keywords. `only_decoder=true`
trains the mask decoder alone, `decoder=published` trains the published form of it.
"""

from rg_jax import recipes
from rg_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, **recipes.MASK_ARGS)
    c = recipes.base()
    c.seed = arg.seed
    if arg.demo:
        recipes.check_tiny(arg)
        c.name = "joint:demo"
        tasks = {"joint": 0.55, "detect": 0.1, "segment": 0.1, "detect_vqa": 0.2, "report": 0.05}
        recipes.phantom_demo(c, tasks, test="joint", text_len=96)
        c.total_steps = arg.steps or 1500
        recipes.tiny_masks(c, slots=5)
    else:
        c.name = "joint" + (":slake" if arg.slake else "") + (",tiny" if arg.tiny else "")
        recipes.paper_masks(c, arg, "joint")
    return recipes.mask_decoder(recipes.adapted(c, arg), arg)
