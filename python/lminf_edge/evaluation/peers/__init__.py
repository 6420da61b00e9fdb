"""Other programs that run the same model, each in a process of its own, to compare with."""
