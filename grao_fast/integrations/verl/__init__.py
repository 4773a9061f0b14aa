"""GRAO in verl, by verl's own registries. Importing this package registers it under three names:

- `actor_rollout_ref.rollout.agent.default_agent_loop=grao`: references as a group's last response
- `algorithm.adv_estimator=grao`: advantages that make verl's loss GRAO's
- `actor_rollout_ref.actor.policy_loss.loss_mode=grao`: no ratio for references

verl imports it in all its processes: it is an entry point of the group `verl.plugins`. See
docs/verl.md and examples/verl. Tested with verl 0.9.1.
"""

from grao_fast.integrations.verl.advantages import grao_advantages
from grao_fast.integrations.verl.loss import grao_policy_loss
from grao_fast.integrations.verl.references import GRAOAgentLoop

__all__ = ["GRAOAgentLoop", "grao_advantages", "grao_policy_loss"]
