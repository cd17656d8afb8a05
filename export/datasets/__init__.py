"""Training data: synthetic studies on the patient grid, slabs cut from them on the fly."""
