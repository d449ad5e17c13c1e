"""The head ops from inside: operator, tile loops, softmax statistics, block selection, backward."""
