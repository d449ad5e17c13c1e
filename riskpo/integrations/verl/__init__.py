"""RiskPO in verl, which loads this module itself through the entry point `verl.plugins`.

    algorithm.adv_estimator=riskpo
    actor_rollout_ref.actor.policy_loss.loss_mode=riskpo
    trainer.checkpoint_callback_class=riskpo.integrations.verl.RiskPOCheckpoint

Importing it registers an estimator and six losses, and replaces nothing. A failure is printed here,
since verl logs it at DEBUG only. `python -m riskpo.integrations.verl` says what is registered.
Tested with verl 0.9.1; other minor versions are refused.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

from riskpo.integrations.common import check_window

LOWEST, BELOW = "0.9.1", "0.10"

try:
    check_window("verl", LOWEST, BELOW)
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    from riskpo.integrations.verl.advantage import CALLBACK, RiskPOCheckpoint, riskpo_advantage
    from riskpo.integrations.verl.head import register_head
    from riskpo.integrations.verl.loss import LOSSES, riskpo_policy_loss, riskpo_token_policy_loss
except Exception as error:
    print(f"riskpo is NOT registered with verl: {error}", file=sys.stderr, flush=True)
    raise

from riskpo_kernels import __version__  # noqa: E402

__all__ = [
    "LOSSES",
    "RiskPOCheckpoint",
    "check_registered",
    "riskpo_advantage",
    "riskpo_policy_loss",
    "riskpo_token_policy_loss",
]


def check_registered() -> None:
    """RuntimeError unless verl's registries hold this module's functions under their names."""
    for found, ours in (
        (get_adv_estimator_fn("riskpo"), riskpo_advantage),
        *((get_policy_loss_fn(name), loss) for name, loss in LOSSES.items()),
    ):
        if found is not ours:
            raise RuntimeError(
                f"riskpo in verl: got {found} under the name of {ours.__name__}; expected our own. "
                "Another plugin has taken the name: leave it out with VERL_USE_EXTERNAL_PLUGINS."
            )


def banner() -> str:
    """One line: versions, names, and the line that keeps the state."""
    return (
        f"riskpo {__version__} in verl {version('verl')} (tested: 0.9.1): estimator riskpo, policy "
        f"losses {', '.join(LOSSES)}; {CALLBACK}"
    )


check_registered()
register_head()
print(banner(), file=sys.stdout if __name__ == "__main__" else sys.stderr, flush=True)
