"""Who gets a release, and when."""
