"""One packed forward of ragged rows through any transformers decoder."""
