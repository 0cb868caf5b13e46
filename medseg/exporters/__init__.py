"""Results on disk: one file per format."""
