"""What lies below all kernels: bitmasks, memory orders, functions with a compiled form."""
