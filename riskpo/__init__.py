"""The thin trainer that proves riskpo_kernels: RiskPO and its baselines on verifiable rewards."""
