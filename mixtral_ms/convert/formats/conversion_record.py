"""The record that a conversion leaves with its output: what it holds, every tensor's hash."""

FOLDER_RECORD = "conversion.json"
"""In a folder for Hugging Face; one of our checkpoints has it all in state.json and manifest."""
RECORD_SUFFIX = ".json"
"""`mixtral.ckpt.json` stands beside `mixtral.ckpt`."""
FORMAT_KEY, FILES_KEY = "weights_format", "files"
