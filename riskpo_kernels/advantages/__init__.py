"""RiskPOAdvantage from inside: settings, bundles, credit, difficulty, statistics."""
