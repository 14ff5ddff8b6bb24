"""The deltas in vLLM's multi-LoRA slots, and vLLM's LoRA as sessions need it."""
