"""Models for other programs: exported networks, checked against the source."""
