"""Engines: one protocol, one process, several implementations."""
