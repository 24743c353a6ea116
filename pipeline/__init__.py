"""Making and examining a student. The only layer that imports torch."""
