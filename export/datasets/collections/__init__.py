"""Public collections of real studies: one small module each, and the form they all come in."""
