"""Why the output is exact: sampling, and verification of candidates."""
