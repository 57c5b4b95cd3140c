"""Plans a run before it starts: parameters, hours, and memory on hardware that need not be present."""
