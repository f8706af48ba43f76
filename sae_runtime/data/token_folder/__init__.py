"""Token folders: text tokenized once, memory-mapped ever after. Written by `saeserve tokenize`, read by training."""
