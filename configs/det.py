"""Grounded reports with boxes: the detection recipe of the RadGrounder paper (MICCAI 2026).

    python -m rg_jax.train --config=configs/det.py                 PaliGemma 2 3B on your RefRad2D
    python -m rg_jax.train --config=configs/det.py:demo            a tiny model on phantoms, CPU

    …/det.py:lora                  low-rank factors beside frozen weights: one GPU of 24 GB
    …/det.py:start=RUN             from the last checkpoint of an earlier run (with lora or not)
    …/det.py:demo,modality=ct      phantoms of one modality (ct or mr)

The paper reports G-IoU 43.6 (frozen adapted encoder), 6 epochs, about 2.5 days on one H100.
The demo needs neither weights nor data; its report page compares it with two blind baselines.
"""

from rg_jax import recipes
from rg_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(
        arg,
        demo=False,
        steps=0,
        variant="3b",
        image_size=224,
        freeze_encoder=True,
        seed=0,
        modality="",
        **recipes.ADAPT_ARGS,
    )
    c = recipes.base()
    c.seed = arg.seed
    return recipes.adapted(_demo(c, arg) if arg.demo else _paper(c, arg), arg)


def _paper(c, arg):
    c.name = "det"
    recipes.paper(c, arg.variant, arg.image_size)
    if not arg.freeze_encoder:
        c.schedule = [(".*", {"decay": "cosine", "warmup_percent": 10})]
    if arg.steps:
        c.total_epochs, c.total_steps = None, arg.steps

    # A slice with boxes and mentions in both languages is always grounded, the others are
    # reports or questions, half and half. SLAKE and VQA-RAD are appended.
    c.data.train = recipes.paper_mixture({"detect": 1.0, "report": 0.5, "vqa": 0.5})
    c.data.val = [recipes.source("refrad2d", "val", {"detect": 1.0})]
    c.data.test = [recipes.source("refrad2d", "test", {"detect": 1.0})]
    return c


def _demo(c, arg):
    recipes.check_tiny(arg)
    c.name = "det:demo"
    tasks = {"detect": 0.65, "detect_vqa": 0.25, "report": 0.05, "vqa": 0.05}
    recipes.phantom_demo(c, tasks, test="detect", text_len=80, modality=arg.modality)
    c.total_steps = arg.steps or 1500
    return c
