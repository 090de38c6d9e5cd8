"""Weights over the ranks: first values, groups, shares, averages, and whole frozen parts."""
