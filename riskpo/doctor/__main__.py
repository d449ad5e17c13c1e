"""`python -m riskpo.doctor`: the same as `riskpo doctor`, with nothing but torch installed."""

import sys

from riskpo.doctor.command import doctor_command

if __name__ == "__main__":
    try:
        doctor_command(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"riskpo: {error}")
