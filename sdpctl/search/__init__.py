"""The search for a ratio at every point under a budget: the space, the environment, the strategies, the study."""
