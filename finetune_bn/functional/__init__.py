"""The tensor maths, free of modules."""
