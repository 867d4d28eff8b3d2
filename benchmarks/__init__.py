"""Timed comparisons of the ops with their references, with attention and with other projects."""
