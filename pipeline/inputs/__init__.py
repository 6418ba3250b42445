"""From files to requests."""
