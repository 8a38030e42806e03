"""The report: a page of what the store knows about networks, and its chart as a picture. Needs neither torch nor the store."""
