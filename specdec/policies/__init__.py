"""When to stop drafting: stop policies, what they estimate, and measured costs."""
