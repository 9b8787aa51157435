"""A run as data: formulas, legs, where they join, the rows they compile to. Never torch."""
