"""The engine: plain PyTorch. It knows no YAML and no store, and prints nothing."""
