"""From disk: models, tokenizers, acceptance heads."""
