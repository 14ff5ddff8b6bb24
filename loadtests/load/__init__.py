"""Load tests: locust users that learn in sessions and know at which version each session must be."""
