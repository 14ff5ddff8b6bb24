"""In the engine core: which request belongs to which session, when it may run, and what each session has learned."""
