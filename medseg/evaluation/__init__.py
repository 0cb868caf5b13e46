"""Scoring predictions against a reference."""
