"""A network, or a whole run, as Python, compiled, or as one captured graph."""
