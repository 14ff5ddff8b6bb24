"""Requests that may not begin yet."""
