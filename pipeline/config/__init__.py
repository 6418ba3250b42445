"""What is asked: the job, prices, templates, and which models these are."""
