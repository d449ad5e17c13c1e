"""What every op shares: checks, backends, tile sizes, products, gradient sums, process groups."""
