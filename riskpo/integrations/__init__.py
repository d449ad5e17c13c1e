"""RiskPO inside other trainers. Each module needs its host installed."""
