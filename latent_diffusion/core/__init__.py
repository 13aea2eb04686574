"""Names that every room uses: types of arrays, keys of random numbers, paths of trees."""
