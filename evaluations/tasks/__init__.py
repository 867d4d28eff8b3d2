"""Tasks: one file each, with its generator, its metric, its source's settings and the published scores."""
