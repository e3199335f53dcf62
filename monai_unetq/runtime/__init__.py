"""Files → predictions. Nothing below imports torch: numpy, safetensors and the engine of an export are enough.

``engine`` reads exported folders and runs them, ``verify`` checks them; ``integer`` is the integer reference, ``packed`` the
reader of packed checkpoints.
"""
