"""A graph on a CPU: operators recorded once, and replayed into the same memory.

lifetimes  memory of a recording, reused once it is free
tape       the operators of a callable, and how each runs again
host       the part of torch.cuda that capturing uses, on such tapes
"""
