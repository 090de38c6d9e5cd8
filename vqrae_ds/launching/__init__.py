"""Starting a run on several machines: which nodes there are, and whether they are fit for it."""
