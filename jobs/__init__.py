"""Who runs what, when, and what it cost: job files and the command line."""
