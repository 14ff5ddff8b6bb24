"""`vllm-ttt sessions`: what people do with sessions from outside, on a state dir or on a server that runs."""
