"""What happens on a device when a release appears."""
