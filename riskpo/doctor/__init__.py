"""`riskpo doctor`: does this machine compute what it should, and do your libraries agree with it?

tolerance.py  the rule by which a result passes; the tests of the kernels use it too
machine.py    versions, backends, errors of each backend and dtype against float64
libraries.py  how to call the log-prob and the loss of torch, TRL, Liger and verl
against.py    one batch through a library's own path and through ours
traps.py      inputs that have broken fused heads before, posed to any log-prob function
command.py    the command line and the Markdown report
"""
