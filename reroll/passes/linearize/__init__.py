"""The parts of the pass `linearize`: what an attention offers, gates, features, calibration."""
