"""What the plan command shows."""
