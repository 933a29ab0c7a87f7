"""rg_jax: grounded radiology reports with PaliGemma 2, in JAX."""

__version__ = "0.1.0"
