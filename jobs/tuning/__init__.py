"""Drafts and heads trained on a job, and profiles of it."""
