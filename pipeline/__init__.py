"""Rows, shards and actors: from input files through a Ray Data actor pool to committed files."""
