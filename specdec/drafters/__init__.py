"""Who proposes candidates: the seam, and what is behind it.

base     the seam: `Drafter`
model    a small language model
eagle    an EAGLE-3 draft, which reads the target's hidden states
making   which of them a draft is
suffix   no model: what was written before
"""
