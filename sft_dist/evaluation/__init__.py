"""Evaluation: held-out perplexity, generated answers, and the pages that show them."""
