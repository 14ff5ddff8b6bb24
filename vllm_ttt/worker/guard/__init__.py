"""Tries what a session has learned on a text that no session sends."""
