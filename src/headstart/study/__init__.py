"""The paper's experiments and its rivals' on one pair: cases, cells, numbers, and one report."""
