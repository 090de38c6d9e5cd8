"""Single-process PyTorch that reads like the paper: no rank, no deepspeed, no files of a run."""
