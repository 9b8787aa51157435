"""A file as data: what it holds, under which names, of which family and which distillation."""
