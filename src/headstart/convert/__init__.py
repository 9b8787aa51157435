"""Files rewritten: a pickle read in a process of its own, another layout, another dtype."""
