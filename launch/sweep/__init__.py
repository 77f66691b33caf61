"""Sweeps: one recipe with many settings, as runs of their own that are compared in one table and one picture."""
