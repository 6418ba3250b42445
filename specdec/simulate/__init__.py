"""Offline only: record what a pair does, replay it under any policy, bound what can be won."""
