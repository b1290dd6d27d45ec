"""Late flights of three airports that keep their data."""
