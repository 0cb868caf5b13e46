"""Batch runs over many studies: ledger, engines, the run."""
