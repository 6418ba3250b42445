"""Finished outputs, read again."""
