"""Training of what speculates: drafts distilled from a target's outputs, and acceptance heads."""
