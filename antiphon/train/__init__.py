"""Training: the world that tiny knows, the data made from it, and the loop that learns it."""
