"""The session's own n-grams: what it was sent, what followed what in it, and mixing that with what the model says."""
