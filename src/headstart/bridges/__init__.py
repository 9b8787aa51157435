"""Headstart inside other programs: each module is what its host loads, and imports it late."""
