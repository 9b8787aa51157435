"""Headstart with other programs: their networks, prompts and samplers with ours, ours in theirs.

No module imports its host at load time, so none has to be installed.
"""
