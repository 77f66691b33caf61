"""sft-dist: distributed post-training of causal language models."""

__version__ = "0.1.0"
