"""Every graph of an Ascend run, compiled on a CPU as far as MindSpore's front end goes."""
