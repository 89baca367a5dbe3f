"""From modules to a graph: what can be followed, and what stays eager Python."""
