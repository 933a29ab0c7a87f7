"""Contrastive adaptation of the encoder on slices and their reports, before det.py or seg.py.

    python -m rg_jax.train --config=configs/siglip.py              SigLIP So400m on your RefRad2D
    python -m rg_jax.train --config=configs/siglip.py:demo         a tiny encoder on phantoms, CPU
    python -m rg_jax.train --config=configs/det.py --config.encoder_weights=RUN/encoder.npz

The RadGrounder paper adapts SigLIP so and then freezes it. The encoder comes out of PaliGemma's own
weights; captions are read by the first `text_layers` layers of its decoder, its token table frozen,
and all of that but the encoder is thrown away afterwards. The whole batch is compared at once, over
all devices: choose `batch_size` as large as they hold.
"""

from rg_jax import recipes
from rg_jax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, demo=False, steps=0, image_size=224, text_layers=4, seed=0)
    c = recipes.base()
    c.seed = arg.seed
    c.objective = "contrastive"
    return _demo(c, arg) if arg.demo else _adapt(c, arg)


def _adapt(c, arg):
    c.name = "siglip"
    recipes.paper(c, image_size=arg.image_size)
    c.runs_without = "configs/siglip.py:demo"
    c.model.llm = {"depth": arg.text_layers}
    c.batch_size, c.accumulation = 512, 1
    c.total_epochs, c.total_steps = (None, arg.steps) if arg.steps else (3, None)
    c.optimizer = {"name": "adamw", "lr": 1e-5, "b2": 0.95, "weight_decay": 1e-4, "clip_norm": 1.0}
    warm_cosine = {"decay": "cosine", "warmup_percent": 5}
    # What is new begins from random numbers and may learn faster.
    c.schedule = [
        ("img/head/.*", None),
        ("llm/embedder/.*", None),
        ("pair/.*", {**warm_cosine, "scale": 10.0}),
        (".*", warm_cosine),
    ]
    c.data.augment = True
    c.data.train = [recipes.source("refrad2d", "train", {"report": 1.0})]
    c.data.val = [recipes.source("refrad2d", "val", {"report": 1.0})]
    c.data.test = [recipes.source("refrad2d", "test", {"report": 1.0})]
    c.eval.samples = 1000
    return c


def _demo(c, arg):
    c.name = "siglip:demo"
    recipes.phantom_demo(c, {"report": 1.0}, test="report", text_len=64)
    c.model.llm = {**c.model.llm, "depth": 1}
    c.batch_size = 64
    c.schedule = [("img/head/.*", None), (".*", {"decay": "cosine", "warmup_steps": 50})]
    c.total_steps = arg.steps or 600
    c.checkpoint_steps = 200
    c.eval.every_steps = 200
    c.eval.samples = 300
    c.eval.final_samples = 0
    return c
