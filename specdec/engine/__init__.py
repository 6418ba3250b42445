"""The loop: admit, draft, verify, commit, retire."""
