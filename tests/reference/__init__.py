"""NumPy twins of the compiled kernel: slow, obvious, the definition of preprocessing version 1."""
