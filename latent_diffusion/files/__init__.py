"""Reading what others wrote: tensors in files, and pickles that never execute code."""
