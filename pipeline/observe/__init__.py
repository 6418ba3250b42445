"""What a running job says of itself: progress, status, metrics, money."""
