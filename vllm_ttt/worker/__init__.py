"""On the device: capture, the micro-step, and the deltas. Runs in vLLM's worker process."""
