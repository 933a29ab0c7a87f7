"""What several configs share. A config file is a page that says what is different.

`base()` lists every field that a run knows, with its meaning; configs change some of them.
"""

import ml_collections

from rg_jax.errors import UserError
from rg_jax.grounding.format import OURS

ConfigDict = ml_collections.ConfigDict


def base() -> ConfigDict:
    """Every field with a sensible value. Durations come as exactly one of `*_steps|…`."""
    c = ConfigDict()
    c.name = ""  # shown on the report page
    c.runs_without = ""  # a config to name when weights, tokenizer or data are missing
    c.seed = 0
    # "text": grounded text is learned. "contrastive": the encoder alone, on images and captions.
    c.objective = "text"

    # The network: a variant of `rg_jax.model.config`, single dimensions overridden below `img`,
    # `llm`.
    c.model = ConfigDict({"variant": "3b", "image_size": 224, "img": {}, "llm": {}})
    c.model.compute_dtype = "bfloat16"
    c.model.remat, c.model.unroll = "full", 1
    c.model.vision_attention = "xla"
    # What it starts from (any form that `rg_jax.weights.formats` knows); "": random numbers.
    # `encoder_weights`: an encoder that goes over that of `weights`. `weights_format`: where
    # weights write places otherwise than `grounding` and `masks` say: "": that is an error,
    # "weights": their way is kept, "config": they are taught the config's way.
    c.weights, c.encoder_weights, c.weights_format = "", "", ""
    # Low-rank factors (LoRA) beside the weights whose whole names match a regex of `include`;
    # rank 0: none. Only `lora/.*` is then to be trained, see `lora()`.
    c.lora = ConfigDict({"rank": 0, "alpha": 32.0})
    # The projection of the patches too: what another modality looks like is learnt there first.
    c.lora.include = [
        "img/embedding/kernel",
        "img/Transformer/.*/kernel",
        "img/head/kernel",
        "llm/layers/(attn|mlp)/.*",
    ]

    # `path`: a SentencePiece model; `vocab_size` > 0 instead trains a small one from the texts of
    # the training split, with as many <locNNNN> as bins and 128 <segNNN>.
    c.tokenizer = ConfigDict({"path": "", "sha256": "", "vocab_size": 0})
    c.grounding = ConfigDict(OURS.to_json())

    # The mask decoder (see `rg_jax.model.config.MaskDecoderConfig`); kind "": none, boxes only.
    # `slots`: masks per sample at most; `size`: their side in pixels, 0 = that of the image.
    # `loss`: "focal" or "bce", each beside dice; `weight`: λ, their share in the whole loss.
    c.masks = ConfigDict({"kind": "", "width": 256, "depth": 2, "num_heads": 8, "mlp_dim": 1024})
    c.masks.project_prompt, c.masks.mask_tokens, c.masks.channels = True, 4, 1
    c.masks.slots, c.masks.size, c.masks.loss, c.masks.weight = 8, 0, "focal", 1.0

    # Where records come from and how they become batches.
    c.data = ConfigDict()
    c.data.dir = "data"
    c.data.train = []  # a list of source(…)
    c.data.val = []
    c.data.test = []
    c.data.languages = ["en", "de"]
    c.data.text_len = 200
    c.data.separator = "joined"
    c.data.image_style = "medgemma"
    c.data.augment = False
    # The paper's rule: a record that can be grounded in all languages always is.
    c.data.grounded_first = True
    c.data.workers = 0  # Grain worker processes; 0: threads of this process
    c.data.threads = 4
    c.data.cache = False  # keep decoded records in memory

    c.total_steps = None
    c.total_epochs = None
    c.total_examples = None
    c.batch_size = 8
    c.accumulation = 1
    c.optimizer = ConfigDict({"name": "adafactor", "lr": 5e-5, "weight_decay": 0.01})
    c.optimizer.clip_norm = 1.0
    # Ordered (regex, schedule or None): None freezes. Every parameter must be covered.
    c.schedule = [(".*", {"decay": "cosine", "warmup_percent": 10})]
    c.frozen_dtype = "bfloat16"
    c.loss = ConfigDict({"normalise": "tokens", "block_size": 32768})

    c.log_steps = 20
    c.checkpoint_steps = 1000
    c.keep_checkpoints = 2
    # While training: loss and G-IoU of this many validation samples, every `every_steps`.
    c.eval = ConfigDict({"every_steps": 2000, "samples": 256, "batch_size": 0})
    # Prompts that each device answers at once, in one program that is always the same: neither
    # batch size nor number of devices changes an answer. Fewer need less memory.
    c.eval.rows = 16
    # At the end: the whole test set (0) or this many samples of it, and the report page.
    c.eval.final_samples = 2000
    c.eval.max_new_tokens = 0  # 0: as many as data.text_len
    c.eval.gallery = 60
    c.eval.bootstrap = 10_000
    # How mentions are compared: "exact", or a sentence-transformers model (folder or name), and
    # which G-IoU comes first: "paper", "published_detection" or "published_segmentation".
    c.eval.embedder, c.eval.definition = "exact", "paper"
    return c


def source(
    name: str,
    split: str,
    tasks: dict[str, float],
    *,
    weight: float = 1.0,
    config: str = "",
    count: str = "records",
) -> dict:
    """One part of a mixture: a built data set, the weights of its tasks, its own weight.

    `weight` 0 means by size. `count`: what its size and an epoch are made of: "records",
    "captions" (slices with the same caption take turns) or "questions" (a set of few images with
    many questions each).
    `config`: the builder config, where a data set was built in several forms.
    """
    return {
        "name": name,
        "split": split,
        "tasks": dict(tasks),
        "weight": weight,
        "config": config,
        "count": count,
    }


def check_tiny(arg) -> None:
    """Raises UserError for a config argument that a tiny model would not heed."""
    big = {"variant": "3b", "image_size": 224, "freeze_encoder": True}
    for name, default in big.items():
        if arg.get(name, default) != default:
            raise UserError(
                f"config argument '{name}' is for the models with weights: the tiny ones of 'demo'"
                " and 'tiny' have dimensions of their own and learn from random numbers"
            )
    if arg.get("demo") and (arg.get("slake") or arg.get("tiny")):
        raise UserError("config argument 'demo' (on phantoms) goes with neither 'slake' nor 'tiny'")


def paper_mixture(tasks: dict[str, float]) -> list[dict]:
    """RefRad2D by its captions, for `tasks`; SLAKE and VQA-RAD appended, by their questions."""
    appended = [
        source(name, "train", {"slake": 1.0}, weight=0.0, count="questions")
        for name in ("slake", "vqa_rad")
    ]
    return [source("refrad2d", "train", tasks, weight=0.0, count="captions"), *appended]


def tiny(c: ConfigDict, image_size: int, vocab_size: int, text_len: int) -> ConfigDict:
    """A model of the real architecture, small enough to train from scratch on two CPU cores."""
    c.model.variant = "tiny"
    c.model.unroll = 64  # no loop over the layers: a quarter faster, and compiled soon enough
    c.model.image_size = image_size
    c.model.img = {"patch_size": 8, "width": 64, "depth": 3, "mlp_dim": 128, "num_heads": 2}
    c.model.llm = {
        "width": 64,
        "depth": 3,
        "mlp_dim": 128,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 32,
    }
    c.model.compute_dtype = "float32"
    # On a CPU memory traffic costs more than computing attention scores twice.
    c.model.remat = "dots_no_batch"
    c.weights, c.tokenizer.path, c.tokenizer.sha256 = "", "", ""
    c.tokenizer.vocab_size = vocab_size
    c.grounding.bins = 64
    c.data.grounded_first = False
    c.data.threads = 1
    c.data.text_len = text_len
    c.data.cache = True
    # From scratch Muon needs a third of the samples that AdamW needs to begin to point.
    c.optimizer = {"name": "muon", "lr": 4e-3, "b2": 0.98, "weight_decay": 0.01, "clip_norm": 1.0}
    c.schedule = [(".*", {"decay": "cosine", "warmup_steps": 100})]
    return c


def phantom_demo(
    c: ConfigDict, tasks: dict[str, float], test: str, text_len: int, modality: str = ""
) -> ConfigDict:
    """A tiny model on the phantoms, evaluated on the task `test`.

    `modality`: "ct" or "mr" for phantoms of that one alone.
    """
    if modality not in ("", "ct", "mr"):
        raise UserError(f"config argument modality='{modality}' is not ct or mr")
    phantoms = f"{modality}64"
    tiny(c, image_size=64, vocab_size=1018, text_len=text_len)
    c.batch_size = 32
    c.data.train = [source("phantom", "train", tasks, config=phantoms)]
    c.data.val = [source("phantom", "val", {test: 1.0}, config=phantoms)]
    c.data.test = [source("phantom", "test", {test: 1.0}, config=phantoms)]
    c.log_steps = 25
    c.checkpoint_steps = 300
    c.eval.every_steps = 600
    c.eval.samples = 64
    c.eval.final_samples = 400
    c.eval.batch_size = 100
    return c


def tiny_masks(c: ConfigDict, slots: int) -> ConfigDict:
    """A mask decoder as small as the `tiny` model."""
    c.masks.kind = "sam"
    c.masks.width, c.masks.depth, c.masks.num_heads, c.masks.mlp_dim = 64, 2, 2, 128
    c.masks.mask_tokens, c.masks.slots = 2, slots
    return c


def paper(c: ConfigDict, variant: str = "3b", image_size: int = 224) -> ConfigDict:
    """The paper's optimisation on PaliGemma 2: encoder frozen, Adafactor, 24 × 12, 6 epochs."""
    c.model.variant, c.model.image_size = variant, image_size
    c.weights = f"weights/paligemma2-{variant}-pt-{image_size}.b16.npz"
    c.tokenizer.path, c.tokenizer.sha256 = f"weights/{TOKENIZER_FILE}", TOKENIZER_SHA256
    c.runs_without = "configs/det.py:demo"
    c.batch_size, c.accumulation = 288, 12
    # On an H200 a quarter faster than "full", which needs 14 GiB less. Without a loop over the
    # layers (any number from theirs on) compiling takes a minute more, a step 3 % and 4 GiB less.
    # More pixels or layers would not fit one device so.
    if variant == "3b" and image_size <= 224:
        c.model.remat, c.model.unroll = "dots_no_batch", 64
    c.total_epochs = 6
    c.optimizer = {"name": "adafactor", "lr": 5e-5, "weight_decay": 0.01, "clip_norm": 1.0}
    warm_cosine = {"decay": "cosine", "warmup_percent": 10}
    # The projector ("img/head") learns, the encoder before it does not.
    c.schedule = [("img/head/.*", warm_cosine), ("img/.*", None), ("llm/.*", warm_cosine)]
    c.data.text_len = 200
    return c


# Arguments of the configs that can start from an earlier run, or train LoRA's factors alone.
ADAPT_ARGS = {"start": "", "lora": False}


def adapted(c: ConfigDict, arg) -> ConfigDict:
    """The recipe, started from the run in `arg.start`, with `arg.lora` learning factors alone.

    The run's last checkpoint gives the parameters, its folder the tokenizer. Factors go beside the
    weights of encoder, projector and decoder; a mask decoder is trained as it is.
    """
    if arg.start:
        c.weights, c.runs_without = arg.start, ""
        c.tokenizer = {"path": f"{arg.start}/{RUN_TOKENIZER}", "sha256": "", "vocab_size": 0}
    if arg.lora:
        tiny = c.model.variant == "tiny"
        c.name = f"{c.name} lora"
        if not tiny:  # for small devices: 10 GiB instead of 28
            c.model.remat, c.model.unroll = "full", 1
        c.lora.rank, c.lora.alpha = (16, 32.0)
        c.optimizer = {"name": "adamw", "lr": 1e-2 if tiny else 2e-4, "clip_norm": 1.0}
        c.optimizer.weight_decay = 0.0
        learns = {"decay": "cosine", "warmup_percent": 10}
        c.schedule = [("lora/.*", learns), (".*", None)]
        if c.masks.kind:
            c.schedule.insert(0, ("masks/.*", learns))
    return c


def slake(c: ConfigDict, tasks: dict[str, float]) -> ConfigDict:
    """SLAKE's own questions and template questions, in English, by the official splits."""
    c.data.languages = ["en"]
    c.data.train = [source("slake", "train", tasks, count="questions")]
    c.data.val = [source("slake", "val", dict.fromkeys(tasks, 1.0))]
    c.data.test = [source("slake", "test", dict.fromkeys(tasks, 1.0))]
    return c


def slake_tiny(c: ConfigDict) -> ConfigDict:
    """A tiny model from scratch on SLAKE, for a CPU: that the path works, not that it is good."""
    tiny(c, image_size=96, vocab_size=1500, text_len=128)
    c.batch_size, c.accumulation = 16, 1
    c.total_epochs, c.total_steps = None, 600
    c.log_steps = 20
    c.checkpoint_steps = 200
    c.eval.every_steps = 300
    c.eval.samples = 48
    c.eval.batch_size = 48
    return c


# Arguments of the configs with masks.
MASK_ARGS = {
    "demo": False,
    "slake": False,
    "tiny": False,
    "steps": 0,
    "variant": "3b",
    "image_size": 224,
    "freeze_encoder": True,
    "only_decoder": False,
    "decoder": "sam",
    "seed": 0,
    **ADAPT_ARGS,
}


def mask_decoder(c: ConfigDict, arg) -> ConfigDict:
    """The kind of decoder, and whether it alone learns, as the arguments say."""
    c.masks.kind = arg.decoder
    if arg.only_decoder and arg.lora:
        raise UserError("config arguments only_decoder and lora: choose one of them")
    if arg.only_decoder:
        c.schedule = [("masks/.*", {"decay": "cosine", "warmup_percent": 10}), (".*", None)]
    return c


def paper_masks(c: ConfigDict, arg, task: str) -> ConfigDict:
    """The paper's optimisation with a mask decoder, on RefRad2D or, with `arg.slake`, on SLAKE."""
    paper(c, arg.variant, arg.image_size)
    config = "seg" if task == "segment" else "joint"
    c.runs_without = f"configs/{config}.py:demo"
    c.masks.kind = "sam"
    warm_cosine = {"decay": "cosine", "warmup_percent": 10}
    if arg.freeze_encoder:
        c.schedule = [("img/head/.*", warm_cosine), ("img/.*", None), (".*", warm_cosine)]
    else:
        c.schedule = [(".*", warm_cosine)]
    c.data.augment = True
    if arg.slake:
        slake(c, {"slake": 0.4, f"{task}_vqa": 0.6})
        c.batch_size, c.accumulation, c.total_epochs = 32, 2, 10
        c.eval.every_steps = 500
        if arg.tiny:
            check_tiny(arg)
            slake_tiny(c)
            tiny_masks(c, slots=8)
            c.data.augment = True
    elif arg.tiny:
        raise UserError("config argument 'tiny' goes with 'slake'; without it there is 'demo'")
    else:
        # The joint model is asked for boxes alone and masks alone too, or it would never learn to
        # be told by its prompt.
        grounded = {"joint": 0.6, "detect": 0.2, "segment": 0.2} if task == "joint" else {task: 1.0}
        c.data.train = paper_mixture({**grounded, "report": 0.5, "vqa": 0.5})
        c.data.val = [source("refrad2d", "val", {task: 1.0})]
        c.data.test = [source("refrad2d", "test", {task: 1.0})]
    if arg.steps:
        c.total_epochs, c.total_steps = None, arg.steps
    return c


RUN_TOKENIZER = "tokenizer.model"  # the copy in a run's folder
TOKENIZER_FILE = "paligemma_tokenizer.model"
TOKENIZER_SHA256 = "8986bb4f423f07f8c7f70d0dbe3526fb2316056c17bae71b1ea975e77a168fc6"
