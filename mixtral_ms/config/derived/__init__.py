"""What follows from a configuration."""
