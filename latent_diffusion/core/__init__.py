"""Names that every subpackage uses: types of arrays, keys of random numbers, paths of trees."""
