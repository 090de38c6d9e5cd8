"""The codes of a whole data set: image shards -> code shards, and back to pictures."""
