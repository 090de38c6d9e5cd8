"""Single-process PyTorch that reads like the paper: no rank, no deepspeed, no file formats of a run."""
