"""The rank grid, communication, and the planner."""
