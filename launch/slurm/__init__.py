"""A recipe on Slurm: submitting it, what runs in the job, what is decided when it ends, and watching it."""
