"""A device's memory: what is free of it, what fits in it, and which networks take turns in it."""
