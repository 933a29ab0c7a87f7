"""Packaging. `pip install -e .` for the CPU, `pip install -e ".[cuda12]"` for an NVIDIA GPU."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "rg_jax/__init__.py").read_text()).group(1)

# What reads hospital data: DICOM, zstandard, parquet, NIfTI.
DATA = ["pydicom>=3", "zstandard", "pyarrow", "nibabel"]
# Plug-ins of pydicom for compressed DICOM. pylibjpeg-libjpeg (JPEG, JPEG-LS) is under the GPL.
CODECS = ["pylibjpeg>=2", "pylibjpeg-openjpeg", "pylibjpeg-libjpeg"]
# What our weights, tokenizers and speed are held against, in tests and benchmarks alone.
PEERS = [
    "torch==2.13.0",  # the version that the reference numbers were made with
    "transformers>=5",
]
# Needs an older protobuf than SentencePiece's own messages do: an environment of its own.
BEAM = ["apache-beam"]
# Sentence embeddings that compare mentions in G-IoU; without them mentions are compared exactly.
EMBED = ["sentence-transformers>=5"]
# The report page is opened in a browser, the notebook executed.
VIEW = ["selenium>=4.20", "nbclient", "nbformat", "ipykernel"]
TEST = ["pytest", "pytest-xdist", "beartype", "ruff"]
TEST += [*DATA, *CODECS, *EMBED, *PEERS, *VIEW]

setup(
    name="rg_jax",
    version=VERSION,
    description="Radiology reports that say where: grounded PaliGemma 2 in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["rg_jax*", "tfds_builders*", "tools*"]),
    package_data={"rg_jax.grounding": ["*.json"], "rg_jax.evaluation": ["fonts/*", "assets/*"]},
    python_requires=">=3.11",
    install_requires=[
        # Backend-neutral: the extras below choose the accelerator.
        "jax>=0.8",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.20",
        "grain>=0.2.12",
        "tensorflow-datasets>=4.9.9",
        "array-record>=0.8",
        "sentencepiece>=0.2.1",
        "protobuf",  # a SentencePiece file taken apart, for its export
        "safetensors>=0.5",
        "ml-collections>=1.1",
        "numpy>=2.0",
        "absl-py",
        "jaxtyping>=0.3",
        "pillow>=10.1",
        "tensorboardX>=2.6",  # event files without TensorFlow
        "tqdm",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "data": DATA,
        "codecs": CODECS,
        "segment": ["TotalSegmentator"],
        "beam": BEAM,
        "embed": EMBED,
        "bench": PEERS,
        "test": TEST,
    },
)
