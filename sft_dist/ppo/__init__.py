"""Proximal policy optimisation of a language model against rewards (`stage: ppo`)."""
