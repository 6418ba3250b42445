"""Training of what speculates: drafts distilled from a target's own outputs."""
