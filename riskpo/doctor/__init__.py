"""`riskpo doctor`: are the loss's numbers right on this machine, and do other libraries agree?

tolerance.py is the rule by which a result passes; the tests of the kernels use it too.
"""
