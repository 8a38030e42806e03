"""Data sets: the table of them, their files, and how their images become batches. Importing it needs no torch."""
