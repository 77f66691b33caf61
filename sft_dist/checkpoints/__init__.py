"""Checkpoints: complete or absent, checked, and one format for every strategy.

A tensor of the training's state (a weight, or one of the optimizer's states of it) is kept as stretches of its
elements in row-major order. What a process holds of it under any strategy is such a stretch, so that any number of
processes, under any strategy, can read what others have written.
"""
