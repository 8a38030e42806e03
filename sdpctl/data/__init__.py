"""Data sets: what they are, where their files lie, and how their images become batches. Importing it needs no torch."""
