"""Runnable compositions of medseg: batch inference, validation report, retraining."""
