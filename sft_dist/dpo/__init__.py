"""Direct preference optimisation: the losses, the reference and what is measured of a pair. See docs/dpo.md."""
