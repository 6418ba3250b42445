"""What is counted and timed: phases, speedup, calibration."""
