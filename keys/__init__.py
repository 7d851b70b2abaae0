"""Why anyone believes a release."""
