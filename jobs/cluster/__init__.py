"""Jobs on a Ray cluster: submit, watch, stop, render."""
