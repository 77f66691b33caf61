"""`sft-dist status`: what a run is doing, by its files and by Slurm, each of which may be away."""
