"""From a job file to a finished output."""
