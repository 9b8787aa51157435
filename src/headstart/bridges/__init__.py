"""Headstart with other programs: their networks, prompts and samplers with ours, ours in theirs.

Each module imports its host late, so that none is needed to load it.
"""
