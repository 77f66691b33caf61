"""The control plane: which processes, where, and what to do when they die. Free of torch."""
