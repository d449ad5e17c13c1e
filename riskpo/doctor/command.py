"""`riskpo doctor`: check the install and the loss's numbers on this machine.

riskpo doctor [--against LIBRARY | --model FOLDER | --report FILE.md]
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from riskpo.doctor.packages import PACKAGES
from riskpo.errors import loading, refusals_in_one_line
from riskpo.files import check_out, write_text
from riskpo.preflight import check_model
from riskpo.report.progress import quiet_loading_bars


def doctor_command(given: Sequence[str]) -> None:
    """Print the findings, and write them as Markdown where --report asks for it."""
    parser = argparse.ArgumentParser(prog="riskpo doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--against", choices=sorted(PACKAGES), help="compare with this library")
    parser.add_argument("--model", help="check the head of this model on its own hidden states")
    parser.add_argument("--report", help="write everything into this Markdown file")
    with refusals_in_one_line(parser.prog):
        options = parser.parse_args(given)
    check_out(options.report)
    check_model(options.model)
    loading("doctor")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _answer(options)
    finally:
        logging.disable(before)


def _answer(options: argparse.Namespace) -> None:
    from riskpo.doctor.report import print_comparison, print_machine, report

    if options.report:
        path = Path(options.report)
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        print(f"report: {write_text(path, report(print, old))}")
    elif options.against:
        print_comparison(options.against)
    else:
        if options.model:
            quiet_loading_bars()
        print_machine(options.model)
