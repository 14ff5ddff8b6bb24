"""What of a prompt need not be computed or learned again, and whose cached blocks may be read."""
