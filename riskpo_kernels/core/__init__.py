"""What every op shares: checks, operators, products of a head, softmax, gradients, groups."""
