"""Read files of other programs: tensors, and pickles, whose code is never executed."""
