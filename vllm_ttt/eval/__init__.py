"""What sessions gain: the oracle, protocols over HTTP, the retrieval baseline, the report, and the demo."""
