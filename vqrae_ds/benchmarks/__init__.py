"""Measurements against a named peer, each in one run of both on one machine."""
