"""The state dir as the engine core uses it."""
