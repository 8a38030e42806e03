"""The stages: each defines its inputs, its key and its work. Importing them needs no torch.

A stage does not know the plan and does not call other stages. It yields each stage whose result it needs; `sdpctl.plan` finds
this result in the store or runs the yielded stage, and sends the artifact back.
"""
