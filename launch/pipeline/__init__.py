"""Stages that take their inputs from one another: what they are, what has become of them, running them in a chain."""
