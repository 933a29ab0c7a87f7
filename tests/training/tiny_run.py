"""A config for tests: the demo's recipe at a size that compiles and trains in seconds.

python -m rg_jax.train --config=tests/training/tiny_run.py --config.data.dir=DIR
"""

from rg_jax import recipes
from rg_jax.config import parse_arg

TASKS = {"detect": 0.5, "report": 0.2, "vqa": 0.2, "detect_vqa": 0.1}


def get_config(arg=None):
    arg = parse_arg(arg, steps=24, batch=8, seed=0, untested=False)
    c = recipes.base()
    c.name = "tiny"
    c.seed = arg.seed
    recipes.tiny(c, image_size=32, vocab_size=760, text_len=96)
    c.model.img = {"patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 2}
    c.model.llm = {
        "width": 16,
        "depth": 1,
        "mlp_dim": 32,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 8,
    }
    c.model.remat = "none"
    c.grounding.bins = 32
    c.batch_size = arg.batch
    c.optimizer.lr = 2e-3
    c.total_steps = arg.steps
    c.data.train = [recipes.source("phantom", "train", TASKS)]
    c.data.val = [recipes.source("phantom", "val", {"detect": 1.0})]
    c.data.test = [] if arg.untested else [recipes.source("phantom", "test", {"detect": 1.0})]
    # Adam makes steps of full length from gradients that are zero but for roundings (the keys'
    # biases); with a larger epsilon, runs that round otherwise can be compared.
    # Muon would enlarge such roundings too.
    c.optimizer.name, c.optimizer.eps = "adamw", 1e-4
    c.schedule = [(".*", {"decay": "cosine", "warmup_steps": 4})]
    c.log_steps = 1
    c.checkpoint_steps = 4
    c.eval.every_steps = 0
    c.eval.samples = 8
    c.eval.final_samples = 0
    c.eval.max_new_tokens = 8
    c.eval.rows = 1
    c.eval.gallery = 4
    c.eval.bootstrap = 100
    return c
