"""The stages: resolve the inputs, call the engine, commit the artifact. One function a stage; importing needs no torch.

Each stage has a key, a hash of its inputs: digests, the part of the recipe that matters, the stage's version. Where the
store holds an artifact of that key, the stage answers with it at once.
"""
