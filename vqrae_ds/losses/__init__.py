"""The terms of the training objective; `objective.py` alone applies their weights."""
