"""Recipes: the YAML that says everything about a run."""
