"""From a dataset to a plan: fingerprint, measured step times, decisions with reasons."""
