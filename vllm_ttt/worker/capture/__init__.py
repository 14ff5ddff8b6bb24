"""What is kept of each batch: rows of activations, whose they are, and where their past is."""
