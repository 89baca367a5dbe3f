"""What graphs say: calls of layers and of ops that save, data flow, aliases, products."""
