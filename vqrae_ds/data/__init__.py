"""Images on disk to batches: the shard index, the deterministic stream over it, safe decoding."""
