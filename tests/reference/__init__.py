"""NumPy twins of the compiled kernel: slow, obvious, and the definition of preprocessing version 1."""
