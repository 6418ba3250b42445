"""Who proposes candidates: the seam, and a small model behind it."""
