"""What is refused, and what is not learned."""
