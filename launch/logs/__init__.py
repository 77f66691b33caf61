"""`sft-dist logs`: the logs of all ranks of a run as one, and which of its failures came first."""
