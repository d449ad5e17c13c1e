"""RiskPO in TRL: `RiskPOTrainer`, `RiskPOConfig`, and `use_riskpo_head` for any GRPOTrainer."""

from riskpo.integrations.trl.config import RiskPOConfig
from riskpo.integrations.trl.head import use_riskpo_head
from riskpo.integrations.trl.trainer import RiskPOTrainer

__all__ = ["RiskPOConfig", "RiskPOTrainer", "use_riskpo_head"]
