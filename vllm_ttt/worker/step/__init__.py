"""The micro-step: from kept rows to an update of the deltas. Numbers alone; it knows no request."""
