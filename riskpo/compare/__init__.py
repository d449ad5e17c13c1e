"""`riskpo compare`: algorithms side by side on equal starts."""
