"""Networks for use elsewhere: ONNX, torch.export, a bundle of many instances. It knows no YAML and no store."""
