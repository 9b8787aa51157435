"""Prompts and tensors of a caller, checked and read: the conditioning of each image and row."""
