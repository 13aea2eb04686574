"""Reading others' files: tensors, and pickles whose code is never executed."""
