"""Every night a dataset: a recipe turns seeds into clean, documented, dated conversations."""
