"""What a finished job says: numbers, pages, costs, comparisons."""
