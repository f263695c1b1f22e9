"""Tokenising, detokenising and stop words."""
