"""What is written, exactly once, and what is known of it."""
