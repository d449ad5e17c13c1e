"""`riskpo doctor`: does this machine compute what it should, and do your libraries agree with it?

tolerance.py is the rule by which a result passes; the tests of the kernels use it too.
"""
